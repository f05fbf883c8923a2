"""A row in a batch, with padding wherever it may stand, is that row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mor import MoRConfig
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    VOCAB,
    configs,
    distinct_rows,
    make_model,
    pad_rows,
    padding_masks,
    random_ids,
    small_config,
)

STRICT = {"atol": 1e-5, "rtol": 1e-5}  # also in float32, for the plain models
LENGTHS = st.lists(st.integers(1, 14), min_size=1, max_size=4)
# The threshold router's selection in training is a quantile of the whole batch, by definition.
PER_ROW = tuple(router for router in ROUTERS if router != "threshold")


def check_rows(
    config: MoRConfig, seed: int, lengths: list[int], masks: list[list[bool]], routing: str
) -> None:
    model = make_model(config, seed, torch.float64)
    rows = distinct_rows(seed, lengths)
    ids, mask = pad_rows(rows, masks, seed)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, routing=routing, use_cache=False)
        assert (batch.depths[mask == 0] == 0).all()
        for row, real, logits, depths in zip(
            rows, mask.bool(), batch.logits, batch.depths, strict=True
        ):
            alone = model(row[None], routing=routing, use_cache=False)
            assert torch.equal(depths[real], alone.depths[0])
            assert_close(logits[real], alone.logits[0], **STRICT)


@given(configs(), SEEDS, LENGTHS, st.data())
def test_batched_equals_alone_under_the_causal_rule(
    config: MoRConfig, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    check_rows(config, seed, lengths, data.draw(padding_masks(lengths)), "causal")


@given(configs(routers=PER_ROW), SEEDS, LENGTHS, st.data())
def test_batched_equals_alone_under_topk(
    config: MoRConfig, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    check_rows(config, seed, lengths, data.draw(padding_masks(lengths)), "topk")


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize(
    ("router", "routing"), [*((r, "causal") for r in ROUTERS), *((r, "topk") for r in PER_ROW)]
)
def test_each_router_with_left_right_and_scattered_padding(
    router: str, kv_sharing: str, routing: str
) -> None:
    masks = [
        [False] * 6 + [True] * 7,
        [True] * 9 + [False] * 4,
        [True, False, False, True, True, False, True, False, True, True, False, False, True],
        [False] * 12 + [True],
    ]
    check_rows(small_config(router, kv_sharing), 1, [sum(row) for row in masks], masks, routing)


@given(configs(), SEEDS, LENGTHS, st.sampled_from(["causal", "topk"]), st.data())
def test_what_stands_at_padding_does_not_matter(
    config: MoRConfig, seed: int, lengths: list[int], routing: str, data: st.DataObject
) -> None:
    """Neither other ids nor numbers that are none; not for logits, losses or gradients."""
    model = make_model(config, seed, torch.float64)
    model.model.router.train(config.router != "random")  # with its losses
    masks = data.draw(padding_masks(lengths))
    rows = distinct_rows(seed, lengths)
    ids, mask = pad_rows(rows, masks, seed)
    real = mask.bool()
    embeds = model.get_input_embeddings()(ids).detach()
    poisoned = embeds.masked_fill(~real[..., None], torch.nan).requires_grad_()
    clean = embeds.clone().requires_grad_()
    outputs, grads = [], []
    for values in (clean, poisoned):
        out = model(
            inputs_embeds=values, attention_mask=mask, routing=routing, use_cache=False,
            labels=ids.masked_fill(~real, -100),
        )  # fmt: skip
        outputs.append(out)
        wanted = [values, *model.model.block.parameters(), *model.model.router.parameters()]
        grads.append(torch.autograd.grad(out.loss, wanted, materialize_grads=True))
    assert torch.equal(outputs[0].depths, outputs[1].depths)
    assert_close(outputs[0].loss, outputs[1].loss, **STRICT)
    assert_close(outputs[0].logits[real], outputs[1].logits[real], **STRICT)
    assert outputs[1].logits.isfinite().all()
    for one, two in zip(*grads, strict=True):
        assert_close(one, two, **STRICT)
    assert (grads[1][0][~real] == 0).all()
    with torch.no_grad():
        others = ids.masked_fill(~real, 0) + (~real) * random_ids(seed + 9, *ids.shape)
        out = model(others % VOCAB, attention_mask=mask, routing=routing, use_cache=False)
    assert_close(out.logits[real], outputs[0].logits[real], **STRICT)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_a_row_of_padding_alone_harms_nobody(router: str, routing: str) -> None:
    model = make_model(small_config(router))
    ids = random_ids(2, 2, 9)
    mask = torch.tensor([[0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad():
        both = model(ids, attention_mask=mask, routing=routing)
        alone = model(ids[1:, 1:8], routing=routing)
        empty = model(ids, attention_mask=torch.zeros_like(ids), routing=routing)
    assert_close(both.logits[1, 1:8], alone.logits[0], **STRICT)
    assert torch.equal(both.depths[1, 1:8], alone.depths[0])
    assert both.logits.isfinite().all()
    assert empty.logits.isfinite().all()
    assert (empty.depths == 0).all()


def test_position_ids_may_be_one_row_for_all() -> None:
    """Transformers' users pass arange(T)[None]; rows that are compacted need their own."""
    model = make_model(small_config("expert_choice"))
    ids = random_ids(0, 3, 10)
    places = torch.arange(10, dtype=torch.int32)[None]
    with torch.no_grad():
        for routing in ("causal", "topk"):
            plain = model(ids, routing=routing)
            given_places = model(ids, routing=routing, position_ids=places)
            moved = model(ids, routing=routing, position_ids=places * 2)
            assert torch.equal(plain.logits, given_places.logits)
            assert torch.equal(plain.depths, given_places.depths)
            assert (moved.logits - plain.logits).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(2, 4), (1, 6), (3, 5), (4,), (3, 2, 5)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_the_wrong_shape_are_refused(shape: tuple[int, ...], use_cache: bool) -> None:
    model = make_model(small_config("fixed"))
    places, mask = torch.zeros(shape, dtype=torch.long), torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"position_ids has shape .*; it must be \[2, 5\]"):
        model(random_ids(0, 2, 5), mask, position_ids=places, use_cache=use_cache)


@pytest.mark.parametrize("router", ROUTERS)
def test_no_tokens_give_no_logits(router: str) -> None:
    """As Transformers' models do: no rows, or rows of nothing."""
    model = make_model(small_config(router))
    ids = random_ids(0, 2, 5)
    for training in (False, True):
        model.train(training)
        for nothing in (ids[:0], ids[:, :0]):
            found = model(nothing, labels=nothing if training else None)
            assert found.logits.shape == (*nothing.shape, model.config.vocab_size)
            assert found.depths.shape == nothing.shape


@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (3, 5), (5,), (2, 1, 5, 5)])
def test_a_mask_of_the_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = make_model(small_config("fixed"))
    with pytest.raises(ValueError, match=r"attention_mask has shape .*; it must be \[2, T\]"):
        model(random_ids(0, 2, 5), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("router", ROUTERS)
def test_hidden_states_stand_where_their_tokens_do(router: str) -> None:
    # In float64: the rounding of a batch and of a row alone differs, and networks magnify it.
    model = make_model(small_config(router, num_recursion_layers=2), dtype=torch.float64)
    lengths, masks = [9, 4], [[True] * 9, [False, True, False, True, True, True] + [False] * 3]
    rows = distinct_rows(0, lengths)
    ids, mask = pad_rows(rows, masks)
    how = {"output_hidden_states": True, "routing": "causal"}
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, **how)
        for number, row in enumerate(rows):
            alone = model(row[None], **how)
            assert len(batch.hidden_states) == len(alone.hidden_states) == 1 + 1 + 3 + 1 + 1
            for one, two in zip(batch.hidden_states, alone.hidden_states, strict=True):
                assert_close(one[number][masks[number]], two[0], **STRICT)
        for state in batch.hidden_states:
            assert (state[mask == 0] == 0).all()
        assert_close(batch.logits, model.model.lm_head(batch.hidden_states[-1]))


@pytest.mark.parametrize("keep", ["causal", "topk"])
def test_hidden_states_are_as_many_when_nobody_goes_on(keep: Any) -> None:
    model = make_model(small_config("threshold"))
    model.model.router.boundary.fill_(torch.inf)
    with torch.no_grad():
        out = model(random_ids(0, 2, 5), output_hidden_states=True, routing=keep)
    assert len(out.hidden_states) == 7
    if keep == "causal":
        assert (out.depths == 1).all()
        assert torch.equal(out.hidden_states[2], out.hidden_states[4])
