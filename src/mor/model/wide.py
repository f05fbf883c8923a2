"""What must stay in float32 does, where a model's ``to``, ``half`` or ``bfloat16`` narrows it.

A router's decision must not hang on the dtype of the rest. Its numbers would lose bits if they were
narrowed and widened again, so they are kept as they were and only follow to the new device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from torch import Tensor, nn


class StaysWide(nn.Module):
    """Base of models, and of the parts in them that stay wide.

    A wrapper from elsewhere has a ``to`` of its own that asks no model below it. Narrow the model
    before it is wrapped; what was narrowed all the same is computed with in float32, and
    :func:`widen_buffers` mends the stored constants before training goes on.

    Attributes:
        stays_wide: whether the module and all below it keep the width that they have.
    """

    stays_wide = False

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As PyTorch's; routers move, but are not narrowed."""
        with keep_wide(self):
            super().to(*args, **kwargs)
        return self

    def half(self, *args: Any) -> Self:
        """As PyTorch's; routers are not narrowed."""
        with keep_wide(self):
            super().half(*args)
        return self

    def bfloat16(self) -> Self:
        """As PyTorch's; routers are not narrowed."""
        with keep_wide(self):
            super().bfloat16()
        return self

    def type(self, dst_type: Any) -> Self:
        """As PyTorch's; routers are not narrowed."""
        with keep_wide(self):
            super().type(dst_type)
        return self


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _wide_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that stay wide, and all below them, each once."""
    seen: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, StaysWide) and module.stays_wide:
            for part in module.modules():
                if part not in seen:
                    seen.add(part)
                    yield part


@contextmanager
def keep_wide(model: nn.Module) -> Iterator[None]:
    """What is narrowed in between, of the parts that stay wide, is as it was before afterwards.

    Each number is the same and of the same dtype; the device is the new one. Gradients too.
    """
    old: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
    for part in _wide_parts(model):
        for name, parameter in part.named_parameters(recurse=False):
            grad = None if parameter.grad is None else parameter.grad.data
            old.append((part, name, parameter.data, grad))
        for name, buffer in part.named_buffers(recurse=False):
            old.append((part, name, buffer, None))
    yield
    for part, name, wide, grad in old:
        now = getattr(part, name)
        if not _is_narrow(now) or _is_narrow(wide):
            continue
        if not isinstance(now, nn.Parameter):
            setattr(part, name, wide.to(now.device))
            continue
        narrow_grad, now.grad = now.grad, None  # a gradient has the dtype of its parameter
        now.data = wide.to(now.device)
        if narrow_grad is not None and grad is not None:
            now.grad = grad.to(now.device)


def widen_buffers(module: nn.Module) -> None:
    """Stored constants that were narrowed, in float32 again, so that running means stay exact."""
    for name, buffer in module.named_buffers(recurse=False):
        if _is_narrow(buffer):
            setattr(module, name, buffer.float())
