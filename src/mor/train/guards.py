"""What ends a run early, in one sentence: a full disk, no memory, a number that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mor.errors import MorError
from mor.train.recipe.recipe import Recipe
from mor.train.state.run_folder import CHECKPOINTS
from mor.train.state.saving import last_good, why

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def lighter(recipe: Recipe) -> str:
    """What to change so that a step of this recipe needs less memory and learns the same."""
    section = recipe.train
    ways = []
    if not section.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing=true")
    divisor = next((n for n in (2, 3, 5, 7) if section.batch_size % n == 0), section.batch_size)
    if section.batch_size > 1:
        ways.append(
            f"set train.batch_size={section.batch_size // divisor} and "
            f"train.gradient_accumulation_steps={section.gradient_accumulation_steps * divisor} "
            "(as many sequences per step)"
        )
    return " or ".join(ways) or "shorten data.seq_len or shrink the model, in a new run"


@contextmanager
def clear_stops(recipe: Recipe, step: Callable[[], int]) -> Iterator[None]:
    """Turn what the system refuses during training into a ``MorError`` that says how to go on.

    Args:
        recipe: what is trained.
        step: the optimiser steps done so far.

    Raises:
        MorError: memory ran out, or a file could not be read or written.
    """
    folder = recipe.run_dir / CHECKPOINTS
    try:
        yield
    except MorError:
        raise
    except OSError as error:
        raise MorError(
            f"stopped after step {step()}: {why(error, recipe.run_dir)}; {last_good(folder)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MorError(
            f"out of memory after step {step()} (micro-batches of {recipe.train.batch_size} "
            f"sequences of {recipe.data.seq_len} tokens); {lighter(recipe)}; {last_good(folder)}"
        ) from error
