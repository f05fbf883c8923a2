"""A lint that runs with the code: what would make the host wait for a GPU raises, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mor.engine.mirror import Answers
from mor.model.routers import tables
from mor.ops import planned

# A number for the host, or a result whose size hangs on numbers.
REFUSED = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique", "_unique2",
    "unique_dim", "equal", "is_nonzero", "bincount",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPIES = {"_to_copy", "copy_"}


class WaitError(AssertionError):
    """Something would have waited."""


class NoWaits(TorchDispatchMode):
    """Refuses operators that wait.

    Attributes:
        lifted: whether a planned read is under way.
        reads: planned reads so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lifted, self.reads = False, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at an operator before it runs."""
        kwargs = kwargs or {}
        if not self.lifted:
            self.check(func.overloadpacket.__name__, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def check(name: str, args: Any, kwargs: Any) -> None:
        """Raise where ``name`` would wait."""
        if name in REFUSED:
            raise WaitError(name)
        if name in _INDEXING:
            places = [part for part in args[1] if part is not None]
            if any(part.dtype in (torch.bool, torch.uint8) for part in places):
                raise WaitError(f"{name} with a mask")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise WaitError("repeat_interleave of numbers that the host does not know")
        if name in _COPIES:
            devices = {a.device for a in args if isinstance(a, Tensor)}
            asked = kwargs.get("device")
            if len(devices | ({torch.device(asked)} if asked is not None else set())) > 1:
                raise WaitError(f"{name} to another device")


@contextmanager
def no_waits() -> Iterator[NoWaits]:
    """Refuse waits, but for :meth:`Answers.lists` and :func:`planned.read`, the planned reads."""
    lint = NoWaits()

    def lift(read: Any) -> Any:
        def lifted(asked: Any) -> Any:
            lint.reads += 1
            lint.lifted = True
            try:
                return read(asked)
            finally:
                lint.lifted = False

        return lifted

    def refusing(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not lint.lifted:
                raise WaitError(f"Tensor.{name}")
            return original(tensor, *args, **kwargs)

        return mock.patch.object(Tensor, name, call)

    def making(name: str) -> Any:
        original = getattr(torch, name)

        def call(data: Any, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            kept = caller == tables.__file__  # made once
            there = isinstance(kwargs.get("device"), torch.device)
            if there and not kept and not lint.lifted and not isinstance(data, Tensor):
                raise WaitError(f"torch.{name} from numbers of the host")
            return original(data, *args, **kwargs)

        return mock.patch.object(torch, name, call)

    # These reach the numbers of a CPU tensor without an operator.
    reads = (
        mock.patch.object(Answers, "lists", lift(Answers.lists)),
        mock.patch.object(planned, "read", lift(planned.read)),
    )
    makes = making("tensor"), making("as_tensor")
    with refusing("tolist"), refusing("numpy"), reads[0], reads[1], makes[0], makes[1], lint:
        yield lint
