"""What every test shares: one thread, fixed seeds, no network, no folder of the user's touched."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Read by the libraries when the tests first import them. `setdefault`, so that
# `HF_HUB_OFFLINE=0 TRANSFORMERS_OFFLINE=0 pytest -m network` can still reach out.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_name, _value)

# The tests run in several processes at once: more threads would only fight over the cores, and one
# thread gives the same sums on every machine.
torch.set_num_threads(1)

# No deadline: a test machine shared with others may be slow at any moment. In CI the examples are
# the same in every run, so that a red build can be repeated; at home each run tries new ones.
_shared: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("few", max_examples=6, derandomize=True, **_shared)
settings.register_profile("ci", max_examples=20, derandomize=True, print_blob=True, **_shared)
settings.register_profile("home", max_examples=20, **_shared)
settings.register_profile("deep", max_examples=500, **_shared)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "home")
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_defaults() -> Iterator[None]:
    """Undo what a test did to torch's global default dtype and grad mode."""
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that stands in for the user's download cache (`$MOR_CACHE`)."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("MOR_CACHE", str(folder))
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    return folder
