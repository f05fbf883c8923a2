"""Tables of whole numbers that the host writes and stages read where they run.

The host never asks the device for them: it reads its own copy. On the CPU both are the same memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """Numbers of the host on ``device``, in one copy that nobody waits for."""
    there = torch.from_numpy(numbers)
    if device.type == "cpu":
        return there
    return there.pin_memory().to(device, non_blocking=True)


def to_int64(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """A list, or a list of lists, as int64 in one copy; numpy reads lists many times faster."""
    return to_device(np.array(numbers, dtype=np.int64), device)


class Answers:
    """Numbers of the device on their way to the host, in one copy.

    float64 holds them all: token ids, yes and no, log-probabilities.
    """

    def __init__(self, answers: Sequence[Tensor]) -> None:
        self.answers = [(a.numel(), a.shape[1:], a.is_floating_point()) for a in answers]
        self.flat = torch.cat([answer.flatten().double() for answer in answers])
        self.event: torch.cuda.Event | None = None
        if self.flat.device.type == "cuda":
            there = torch.empty_like(self.flat, device="cpu", pin_memory=True)
            self.flat = there.copy_(self.flat, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def lists(self) -> list[list[Any]]:
        """Each of them as a list, or a list of rows. This is where a tick waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        flat = self.flat.tolist()
        found: list[list[Any]] = []
        end = 0
        for count, inner, real in self.answers:
            own = flat[end : end + count] if real else list(map(int, flat[end : end + count]))
            if inner:
                own = [own[at : at + inner[0]] for at in range(0, count, inner[0])]
            found.append(own)
            end += count
        return found


def read(answers: Sequence[Tensor]) -> list[list[Any]]:
    """The numbers of ``answers`` now."""
    return [answers[0].tolist()] if len(answers) == 1 else Answers(answers).lists()


class Reads:
    """What a tick has to know of the device: asked for at once, read in one place.

    Args:
        late: ticks that may be on their way; None: everything is read when it is asked for.
    """

    def __init__(self, late: int | None) -> None:
        self.late = late
        self._asked: list[tuple[Sequence[Tensor], Callable[..., None]]] = []
        self._flights: deque[tuple[Answers, list[tuple[int, Callable[..., None]]]]] = deque()

    def ask(self, answers: Sequence[Tensor], then: Callable[..., None]) -> None:
        """Call ``then`` with the numbers of ``answers`` when they are there."""
        if self.late is None:
            then(*read(answers))
        else:
            self._asked.append((answers, then))

    def end_tick(self, busy: Callable[[], bool] = lambda: True) -> None:
        """Send off what this tick asked, and read what ticks before asked.

        A tick that asked nothing has nothing to do before all answers are there.

        Args:
            busy: whether the next tick has enough to do without what this one asked; else that is
                read too. Nobody asks where everything is read at once.
        """
        if self.late is None:
            return
        asked, self._asked = self._asked, []
        if asked:
            every = Answers([answer for answers, _ in asked for answer in answers])
            self._flights.append((every, [(len(answers), then) for answers, then in asked]))
        on_their_way = self.late if asked and busy() else 0
        while len(self._flights) > on_their_way:
            every, asking = self._flights.popleft()
            lists = iter(every.lists())
            for count, then in asking:
                then(*islice(lists, count))

    def settle(self, busy: Callable[[], bool]) -> None:
        """Within a tick: read all that was asked so far, unless it is ``busy``; else ask on."""
        if self.late is not None and not busy():
            self.end_tick(lambda: False)


class Mirror:
    """One table in two places.

    Args:
        shape: [rows, ...].
        device: where stages read it.

    Attributes:
        host: what the host writes.
        there: the same on the device, after :meth:`push`.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.host = np.zeros(shape, dtype=np.int64)
        own = torch.from_numpy(self.host)
        self._apart = device.type != "cpu"
        self.there = own.to(device) if self._apart else own
        self._changed: dict[int, None] = {}

    def note(self, rows: Iterable[int]) -> None:
        """``rows`` were written."""
        if self._apart:
            self._changed |= dict.fromkeys(rows)

    def push(self) -> None:
        """Bring what was written to the device, all rows in one copy."""
        if not self._changed:
            return
        rows = np.array(list(self._changed), dtype=np.int64)
        self._changed.clear()
        index, fresh = (to_device(part, self.there.device) for part in (rows, self.host[rows]))
        self.there.index_copy_(0, index, fresh)
