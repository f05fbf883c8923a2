"""Whether there are kernels, and with how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mor.ops import native


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


needs_kernels = pytest.mark.skipif(native.library() is None, reason=native.missing())
