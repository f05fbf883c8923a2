"""How a step is split into micro-batches, or checkpointed, changes the loss by rounding only.

For every router and KV mode. Two things are defined over a micro-batch and so depend on the split:
the threshold router's quantile and token choice's balancing loss. The tests replace just that one
thing by one that does not, and find nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from mor.model.routers import boundary
from mor.train import train
from tests.strategies import KV_SHARING, ROUTERS
from tests.tiny import prepare_tiny, tiny_recipe

pytestmark = pytest.mark.slow

BATCH = 8
MODEL: dict[str, dict[str, Any]] = {
    "expert_choice": {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1},
    "threshold": {},
    "token_choice": {"router_balancing": "loss_free", "router_z_loss_coef": 0.1},
    "random": {},
    "fixed": {},
}


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("more"), documents=20, words=60)


def run(data: Path, out: Path, router: str, model: dict[str, Any], size: int, **fields: Any) -> Any:
    """Log entries and weights of three steps of BATCH sequences, ``size`` at once."""
    recipe = tiny_recipe(
        data,
        out,
        router,
        {"initializer_range": 0.25} | model,  # tokens really differ in depth
        **{
            "budget": {"steps": 3},
            "batch_size": size,
            "gradient_accumulation_steps": BATCH // size,
            "warmup_fraction": 0.0,
            # Large enough that rounding errors of tiny gradients are not blown up to whole steps.
            "adam_epsilon": 1e-3,
        }
        | fields,
    )
    folder = train(recipe)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    weights = load_file(folder / "model" / "model.safetensors")
    # Where the boundary lies is estimated per micro-batch; no gradient reads it.
    return steps, {k: v for k, v in weights.items() if "boundary" not in k}


def assert_same(found: Any, expected: Any) -> None:
    for entry, other in zip(found[0], expected[0], strict=True):
        for name in ("loss", "lm_loss", "grad_norm", "router/z_loss", "router/aux_loss"):
            assert (name in entry) == (name in other)
            assert entry.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4), name
    assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def constant_boundary(values: Tensor, kept: Tensor, valid: Tensor | None) -> Tensor:
    """In place of the batch's quantile: what one carried over from earlier steps would be."""
    return values.new_zeros(())


@pytest.fixture
def split_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantile that no split changes."""
    monkeypatch.setattr(boundary, "batch_boundary", constant_boundary)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_accumulation(
    router: str, kv_sharing: str, more_data: Path, tmp_path: Path, split_alike: None
) -> None:
    model = MODEL[router] | {"kv_sharing": kv_sharing}
    whole = run(more_data, tmp_path / "8", router, model, 8)
    # By turns, so that every router and every mode meets both.
    size = (4, 1)[(ROUTERS.index(router) + KV_SHARING.index(kv_sharing)) % 2]
    assert_same(run(more_data, tmp_path / str(size), router, model, size), whole)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_checkpointing(router: str, kv_sharing: str, more_data: Path, tmp_path: Path) -> None:
    """With accumulation, and with the quantile as it is."""
    model = MODEL[router] | {"kv_sharing": kv_sharing}
    plain = run(more_data, tmp_path / "plain", router, model, 4)
    frugal = run(more_data, tmp_path / "frugal", router, model, 4, gradient_checkpointing=True)
    assert_same(frugal, plain)


# What the split does change, and by nothing else -----------------------------------------------


@pytest.mark.parametrize("router", ["threshold"])
def test_the_exceptions_are_real(router: str, more_data: Path, tmp_path: Path) -> None:
    """Otherwise docs/runs.md would warn of nothing, and ``split_alike`` would hide nothing."""
    whole, split = (
        run(more_data, tmp_path / str(size), router, MODEL[router], size)[0] for size in (8, 1)
    )
    assert whole[0]["lm_loss"] != pytest.approx(split[0]["lm_loss"], rel=1e-4)


def test_threshold_at_full_capacity(more_data: Path, tmp_path: Path) -> None:
    """Where nothing is selected there is no quantile, and no exception."""
    model = MODEL["threshold"] | {"router_capacities": [1.0, 1.0, 1.0]}
    whole, split = (run(more_data, tmp_path / str(n), "threshold", model, n) for n in (8, 2))
    assert_same(split, whole)


def test_balancing_loss(more_data: Path, tmp_path: Path) -> None:
    """A product of two means over the micro-batch: it alone differs, and only when it is weighted.

    In the first step the weights are the same, so the language-model loss is; the balancing loss of
    a micro-batch is at least as uneven as that of the whole.
    """
    model = {"router_balancing": "loss", "router_balancing_loss_coef": 0.1}
    whole, split = (run(more_data, tmp_path / str(n), "token_choice", model, n)[0] for n in (8, 1))
    assert split[0]["lm_loss"] == pytest.approx(whole[0]["lm_loss"], rel=1e-5)
    name = "router/balancing_loss"
    assert split[0][name] != pytest.approx(whole[0][name], rel=1e-4)
    without = {"router_balancing": "loss", "router_balancing_loss_coef": 0.0}
    whole, split = (
        run(more_data, tmp_path / f"without-{n}", "token_choice", without, n) for n in (8, 1)
    )
    assert_same(split, whole)
