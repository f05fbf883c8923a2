"""``torch.export`` of router-free models: the same logits, for other batches and lengths too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim, export
from torch.testing import assert_close

from mor import MoRBaseModel
from tests.strategies import make_model, random_ids, small_config

IDS = random_ids(1, 3, 9)
PLAIN = {"use_cache": False}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_recursions": 1},
        {"kv_sharing": "recursive_update"},
        {"recursion_seam": "norm_inject", "relaxation": "lora", "sharing": "cycle"},
    ],
    ids=["vanilla", "shared", "seam"],
)
def test_rows_and_tokens_may_change(fields: dict[str, Any]) -> None:
    model = make_model(small_config("fixed", **fields))
    rows, tokens = Dim("rows", min=2, max=16), Dim("tokens", min=2, max=64)
    sizes = {"input_ids": {0: rows, 1: tokens}, "use_cache": None}
    program = export(model, (IDS,), PLAIN, dynamic_shapes=sizes).module()
    for ids in (IDS, random_ids(2, 5, 17)):
        with torch.no_grad():
            assert_close(program(ids, **PLAIN).logits, model(ids, **PLAIN).logits, **CLOSE)


@pytest.mark.parametrize("kv_sharing", ["none", "recursive", "recursive_update"])
def test_padding_anywhere_is_an_input(kv_sharing: str) -> None:
    model = make_model(small_config("fixed", kv_sharing))
    mask = torch.ones_like(IDS)
    program = export(model, (IDS,), {"attention_mask": mask, **PLAIN}).module()
    mask = mask.clone()
    mask[0, 6:] = mask[1, :3] = mask[2, 4] = 0
    with torch.no_grad():
        found = program(IDS, attention_mask=mask, **PLAIN)
        wanted = model(IDS, attention_mask=mask, **PLAIN)
    real = mask.bool()
    assert_close(found.logits[real], wanted.logits[real], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.depths, wanted.depths)


def test_defaults_are_enough() -> None:
    model = make_model(small_config("fixed"))
    assert_close(export(model, (IDS,)).module()(IDS).logits, model(IDS).logits, **CLOSE)
    base = MoRBaseModel(small_config("fixed")).eval()
    found = export(base, (IDS,)).module()(IDS).last_hidden_state
    assert_close(found, base(IDS).last_hidden_state, **CLOSE)


def test_a_routed_model_says_why_not() -> None:
    with pytest.raises(ValueError, match="router='threshold' gives each its own"):
        export(make_model(small_config("threshold")), (IDS,), PLAIN)
    with pytest.raises(ValueError, match="without document_ids and without a cache"):
        export(make_model(small_config("fixed")), (IDS,), {"use_cache": True})
