"""Evaluation under the causal rule, and beside it under the leaky one, named as such."""

from mor.eval.calibrate import calibrate
from mor.eval.card import write_card
from mor.eval.evaluate import evaluate

__all__ = ["calibrate", "evaluate", "write_card"]
