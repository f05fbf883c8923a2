"""Everything about each token of a sample, against what `evaluate` says of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch.utils.data import Dataset

from mor.data import PackedDataset
from mor.errors import MorError
from mor.eval import calibrate, evaluate
from mor.eval.routes import collect_routes
from tests.strategies import make_model, small_config
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def dataset(data: Any) -> Dataset:
    return PackedDataset(data, "train", SEQ_LEN)


@pytest.mark.parametrize("router", ["threshold", "expert_choice", "token_choice"])
def test_tokens_add_up_to_the_evaluation(dataset: Any, router: str) -> None:
    model = make_model(small_config(router, vocab_size=dataset.index.vocab_size), 1)
    if router != "token_choice":
        calibrate(model, dataset, max_sequences=8)
    wanted = evaluate(model, dataset, max_sequences=8)
    routes = collect_routes(model, dataset, max_sequences=8, batch_size=3)
    assert routes.ids.shape == routes.depths.shape == (8, SEQ_LEN)
    for cap, nll in zip(wanted["depth_cap"], routes.nll, strict=True):
        assert nll.mean() == pytest.approx(cap["nll"], abs=1e-5)
    last = wanted["passes"][-1]
    assert routes.hits[-1].mean() == pytest.approx(last["accuracy"])
    fixed = (routes.hits[-1] & ~routes.hits[-2]).sum()
    assert fixed == last["fixed"]
    numbers = routes.router_numbers()
    assert numbers["mean_depth"] == pytest.approx(wanted["causal"]["mean_depth"])
    assert numbers["dead_positions"] == pytest.approx(wanted["router"]["dead_tokens"])
    assert numbers["max_vio"] == pytest.approx(wanted["router"]["max_vio"])
    assert numbers["depth_entropy"] == pytest.approx(wanted["router"]["entropy"])
    assert routes.entropy.min() >= 0
    assert routes.entropy.max() <= np.log(model.config.vocab_size) + 1e-5
    for depth, (values, active) in enumerate(routes.scores):
        ran = int((routes.depths > depth).sum())
        if router == "token_choice":
            assert len(values) == int((routes.depths == depth + 1).sum())
            assert not routes.boundaries
        else:
            assert len(values) == int((routes.depths >= depth).sum())
            assert active.sum() == ran
            if depth:
                assert ((values > routes.boundaries[depth]) == active).all()


def test_models_that_route_nothing_are_refused(dataset: Any) -> None:
    model = make_model(small_config("fixed", vocab_size=dataset.index.vocab_size))
    with pytest.raises(MorError, match=r"router='fixed' with num_recursions=3 sends every token"):
        collect_routes(model, dataset)
