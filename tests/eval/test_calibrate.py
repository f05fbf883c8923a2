"""Calibration: on its sample the causal rule runs each depth at the capacity that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from mor import ConfigError, MoRForCausalLM
from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval import calibrate, evaluate
from tests.strategies import SEEDS, make_model, small_config
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def dataset(data: Path) -> PackedDataset:
    return PackedDataset(data, "train", SEQ_LEN)


def model_of(router: str, dataset: PackedDataset, seed: int = 0, **fields: Any) -> MoRForCausalLM:
    return make_model(small_config(router, vocab_size=dataset.index.vocab_size, **fields), seed)


ROUTERS = st.sampled_from(["expert_choice", "threshold"])
SHARES = st.lists(st.floats(0.05, 1), min_size=3, max_size=3).map(lambda s: sorted(s)[::-1])


@given(
    router=ROUTERS,
    capacities=SHARES,
    objective=st.sampled_from(["none", "aux_loss", "aux_router"]),
    kv_sharing=st.sampled_from(["none", "recursive"]),
    sequences=st.integers(2, 9),
    seed=SEEDS,
)
def test_capacities_are_hit_on_the_sample(
    dataset: PackedDataset,
    router: str,
    capacities: list[float],
    objective: str,
    kv_sharing: str,
    sequences: int,
    seed: int,
) -> None:
    model = model_of(router, dataset, seed, router_objective=objective, kv_sharing=kv_sharing)
    boundaries = calibrate(
        model, dataset, max_sequences=sequences, batch_size=3, capacities=capacities
    )
    assert boundaries == model.model.router.boundary.tolist()
    assert model.config.router_capacities == capacities
    found = evaluate(model, dataset, max_sequences=sequences)["causal"]["active_fraction"]
    # To a token, and one more where the batch it is computed in rounds a score differently.
    assert found == pytest.approx(capacities, abs=2.01 / (sequences * SEQ_LEN))


def test_default_is_the_models_own(dataset: PackedDataset) -> None:
    model = model_of("threshold", dataset)
    calibrate(model, dataset, max_sequences=6)
    found = evaluate(model, dataset, max_sequences=6)["causal"]["active_fraction"]
    assert found == pytest.approx([1, 2 / 3, 1 / 3], abs=0.02)


def test_the_boundary_becomes_the_rule(dataset: PackedDataset) -> None:
    """Otherwise a model of the 0.5 rule would pay no heed to what was calibrated."""
    model = model_of("expert_choice", dataset, router_decision_rule="half")
    calibrate(model, dataset, max_sequences=6, capacities=[1.0, 0.5, 0.25])
    assert model.config.router_decision_rule == "boundary"
    found = evaluate(model, dataset, max_sequences=6)["causal"]["active_fraction"]
    assert found == pytest.approx([1, 0.5, 0.25], abs=0.02)


@pytest.mark.parametrize("router", ["fixed", "random", "token_choice"])
def test_routers_without_boundaries(router: str, dataset: PackedDataset) -> None:
    with pytest.raises(MorError, match=f"router='{router}' stores no boundaries"):
        calibrate(model_of(router, dataset), dataset)


class Failing(Dataset[dict[str, torch.Tensor]]):
    """A dataset that cannot be read any more after ``reads`` sequences."""

    def __init__(self, inner: PackedDataset, reads: int) -> None:
        self.inner, self.reads = inner, reads

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.reads -= 1
        if self.reads < 0:
            raise MorError("shard is damaged")
        return self.inner[index]


@pytest.mark.parametrize("training", [True, False])
def test_where_it_raises_the_model_is_as_it_was(training: bool, dataset: PackedDataset) -> None:
    model = model_of("threshold", dataset, router_decision_rule="half").train(training)
    before = model.model.router.boundary.clone(), list(model.config.router_capacities)
    with pytest.raises(ConfigError, match="rises with depth"):
        calibrate(model, dataset, capacities=[0.5, 0.75, 0.2])
    with pytest.raises(ConfigError, match="2 entries"):
        calibrate(model, dataset, capacities=[0.5, 0.2])
    with pytest.raises(MorError, match="max_sequences=0"):
        calibrate(model, dataset, max_sequences=0)
    # Eight reads are one pass over the sample: this one ends within the second depth's.
    with pytest.raises(MorError, match="shard is damaged"):
        calibrate(model, Failing(dataset, 12), max_sequences=8, capacities=[0.5, 0.2, 0.1])
    assert torch.equal(model.model.router.boundary, before[0])
    assert model.config.router_capacities == before[1]
    assert model.config.router_decision_rule == "half"
    assert model.training == training
