"""Documents packed into one row are blind to each other, at every depth and in every KV mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mor import MoRConfig
from tests.strategies import (
    KV_SHARING,
    ROUTERS,
    SEEDS,
    configs,
    distinct_rows,
    make_model,
    random_ids,
    small_config,
    train,
)

NEAR = {"atol": 1e-7, "rtol": 1e-7}
# The threshold router's selection in training is a quantile of the whole batch, by definition.
PER_ROW = tuple(router for router in ROUTERS if router != "threshold")
LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def numbered(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Document of each token and place within it, [1, T]."""
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])
    return documents[None], places[None]


@given(
    st.one_of(
        st.tuples(configs(), st.just("causal")),
        st.tuples(configs(routers=PER_ROW), st.just("topk")),
    ),
    SEEDS,
    LENGTHS,
    st.booleans(),
)
def test_a_document_in_a_packed_row_is_the_document_alone(
    how: tuple[MoRConfig, str], seed: int, lengths: list[int], padded: bool
) -> None:
    """Under either rule; with another row beside it, and with padding at its end."""
    config, routing = how
    model = make_model(config, seed, torch.float64)
    rows = distinct_rows(seed, lengths)
    documents, places = numbered(lengths)
    width = documents.shape[1] + 2 * padded
    ids = random_ids(seed, 2, width)
    ids[0, : documents.shape[1]] = torch.cat(rows)
    spare = width - documents.shape[1]
    documents = torch.cat((documents, documents[:, -1:].expand(1, spare)), 1)
    places = torch.cat((places, torch.zeros(1, spare, dtype=torch.long)), 1)
    mask = torch.ones_like(ids)
    mask[0, width - spare :] = 0
    with torch.no_grad():
        together = model(
            ids,
            attention_mask=mask if padded else None,
            document_ids=torch.cat((documents, torch.zeros(1, width, dtype=torch.long))),
            position_ids=torch.cat((places, torch.arange(width)[None])),
            use_cache=False,
            routing=routing,
        )
        begin = 0
        for row in rows:
            alone = model(row[None], use_cache=False, routing=routing)
            here = slice(begin, begin + len(row))
            assert torch.equal(together.depths[0, here], alone.depths[0])
            assert_close(together.logits[0, here], alone.logits[0], **NEAR)
            begin += len(row)
        beside = model(ids[1:], use_cache=False, routing=routing)
        assert_close(together.logits[1], beside.logits[0], **NEAR)


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_no_gradient_crosses_a_document_in_training(router: str, kv_sharing: str) -> None:
    """Attention carries none; the batch-wide choice of tokens carries none by its nature."""
    config = small_config(router, kv_sharing, router_aux_loss_coef=0.0)
    config.router_balancing = "none"
    model = make_model(config, 3).train()
    documents, places = numbered([6, 1, 8])
    ids = random_ids(3, 1, 15)
    embedded = model.model.embed(ids).detach().requires_grad_()
    out = model(
        inputs_embeds=embedded, document_ids=documents, position_ids=places, use_cache=False
    )
    (grad,) = torch.autograd.grad(out.logits[0, 7:].square().sum(), embedded)
    reached = grad[0].abs().sum(-1)
    assert (reached[:7] == 0).all()
    assert (reached[7:] > 0).all()


@pytest.mark.parametrize("router", ["expert_choice", "threshold", "token_choice"])
def test_one_document_per_row_is_no_mask_at_all(router: str) -> None:
    ids = random_ids(5, 3, 14)
    results = []
    for documents in (None, torch.zeros_like(ids)):
        model = make_model(small_config(router), 5)
        out = train(model, ids, document_ids=documents)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out.loss.detach(), grads))
    assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", ["random", "fixed"])
def test_a_document_begins_at_place_0(router: str) -> None:
    """Told or not, padding or none: the random router, which asks for places, sees no other one."""
    model = make_model(small_config(router))
    documents, places = numbered([4, 1, 6])
    ids = random_ids(6, 1, 11)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0]])
    real = mask[0].bool()
    _, left = numbered([3, 1, 4])
    places_left = places.clone()
    places_left[0, real] = left[0]
    with torch.no_grad():
        for given, told in ((None, places), (mask, places_left)):
            one = model(ids, given, document_ids=documents, use_cache=False)
            two = model(ids, given, told, document_ids=documents, use_cache=False)
            assert torch.equal(one.logits, two.logits)
            assert torch.equal(one.depths, two.depths)


def test_documents_must_fit_the_ids_and_have_no_cache() -> None:
    model, ids = make_model(small_config("fixed")), random_ids(0, 2, 6)
    with pytest.raises(ValueError, match=r"document_ids has shape \(2, 5\); it must be \[2, 6\]"):
        model(ids, document_ids=torch.zeros(2, 5, dtype=torch.long), use_cache=False)
    with pytest.raises(ValueError, match="document_ids cannot be given with a cache"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)
