"""Evaluation under the causal rule, and beside it under the leaky one, named as such."""

from mor.eval.calibrate import calibrate
from mor.eval.card import write_card
from mor.eval.evaluate import evaluate
from mor.eval.folder_card import write_folder_card

__all__ = ["calibrate", "evaluate", "write_card", "write_folder_card"]
