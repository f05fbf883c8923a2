"""What ends a run early: a signal, a full disk, too little memory, a number that is not finite."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.errors import MorError
from mor.run_files import CHECKPOINTS
from mor.train.recipe.recipe import Recipe
from mor.train.state.saving import describe_last_good, describe_write_failure

_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the device or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def suggest_less_memory(recipe: Recipe) -> str:
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
def explain_stops(recipe: Recipe, step: Callable[[], int]) -> Iterator[None]:
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
            f"stopped after step {step()}: {describe_write_failure(error, recipe.run_dir)}; "
            f"{describe_last_good(folder)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MorError(
            f"out of memory after step {step()} (micro-batches of {recipe.train.batch_size} "
            f"sequences of {recipe.data.seq_len} tokens); {suggest_less_memory(recipe)}; "
            f"{describe_last_good(folder)}"
        ) from error


@dataclass(frozen=True)
class FiniteGuard:
    """Stops a run whose numbers are not finite, before they reach the weights or a checkpoint.

    Attributes:
        learning_rate: the recipe's, for the advice.
        checkpoints: their folder, for the message.
    """

    learning_rate: float
    checkpoints: Path

    def check(self, values: Mapping[str, Tensor], step: int) -> None:
        """Look at scalars of optimiser step ``step`` (1-based); one number is read from the device.

        Raises:
            MorError: one of them is not finite.
        """
        together = torch.stack([value.float() for value in values.values()])
        if bool(torch.isfinite(together).all()):
            return
        wrong = {name: float(value) for name, value in values.items() if not value.isfinite()}
        name, value = next(iter(wrong.items()))
        raise self.error(f"the {name} is {value}", step)

    def error(self, what: str, step: int) -> MorError:
        """The error that says what is wrong at ``step`` and how to go on."""
        return MorError(
            f"{what} at step {step}; lower train.learning_rate={self.learning_rate} in a branch "
            "off an earlier checkpoint (--branch-from), or warm up longer in a new run; "
            f"checkpoints in {self.checkpoints} are untouched"
        )


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 (what batch systems send before time is up), taken as a wish.

    Attributes:
        asked: whether this process was asked to stop.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, *, alone: bool) -> Iterator[None]:
        """Catch the signals while training runs; a second Ctrl-C interrupts at once.

        Args:
            alone: no other rank trains along. Among several a second signal changes nothing: their
                launcher sends one of its own after the one that the terminal sent.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ("SIGINT", "SIGTERM", "SIGUSR1")
        signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in signals}

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                if alone and number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self.asked = True
            # No print: a signal may come in the middle of one.
            os.write(
                2, b"\nstopping after this step, with a checkpoint; Ctrl-C again to stop now\n"
            )

        for number in signals:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
