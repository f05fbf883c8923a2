"""The network as TRL calls it: the same states, router gradients included, documents apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening

from mor import MoRConfig, MoRForCausalLM
from mor.hf.backbone import packed_documents
from tests.strategies import ROUTERS, make_model, random_ids, small_config


def gradients(model: MoRForCausalLM) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def config_of(router: str) -> MoRConfig:
    coefficient = {} if router in ("fixed", "random") else {"router_z_loss_coef": 0.1}
    return small_config(router, router_aux_loss_coef=0.5, **coefficient)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_head_outside_gets_the_gradients_of_the_loss_inside(router: str) -> None:
    model = make_model(config_of(router), dtype=torch.float64).train()
    ids = random_ids(3, 3, 12)
    torch.manual_seed(0)  # the random router draws
    model.model.router.finish_step()
    model(ids, labels=ids).loss.backward()
    inside = gradients(model)
    torch.manual_seed(0)
    model.model.router.finish_step()
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    logits = F.linear(hidden, model.get_output_embeddings().weight)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    outside = gradients(model)
    assert_close(outside, inside, rtol=1e-5, atol=1e-6)
    if router not in ("fixed", "random"):
        # The terms are not too small to be seen.
        model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
        model.config.router_balancing_loss_coef = 0.0
        model(ids, labels=ids).loss.backward()
        without = gradients(model)["model.router.net.weight"]
        assert (without - inside["model.router.net.weight"]).abs().max() > 1e-4


def test_router_terms_are_shared_out_among_micro_batches() -> None:
    model = make_model(config_of("expert_choice"), dtype=torch.float64).train()
    ids = random_ids(3, 3, 12)
    found = []
    for micro_batches in (1, 4):
        model.model.router.begin_step(0, micro_batches)
        (model.base_model(ids).last_hidden_state * 0).sum().backward()
        found.append(gradients(model)["model.router.net.weight"])
    assert found[0].abs().max() > 1e-4
    assert_close(found[1] * 4, found[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_documents_of_one_row_do_not_see_each_other(router: str, training: bool) -> None:
    model = make_model(small_config(router), dtype=torch.float64).train(training)
    lengths = [5, 1, 7]
    ids = random_ids(4, 1, sum(lengths))
    bounds = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model.base_model(ids, position_ids=positions, cu_seq_lens_q=bounds).last_hidden_state
    alone = [model.base_model(row[None]).last_hidden_state for row in ids[0].split(lengths)]
    assert packed.shape == (1, 13, 32)
    assert_close(packed, torch.cat(alone, 1))


def test_the_state_is_the_one_the_head_gets() -> None:
    model = make_model(small_config("threshold"))
    ids = random_ids(4, 2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    hidden = model.base_model(ids, attention_mask=mask).last_hidden_state
    assert_close(hidden, output.hidden_states[-1])


def test_nobody_takes_it_for_a_mixture_of_experts() -> None:
    config = small_config("expert_choice")
    config.output_router_logits = True
    assert not hasattr(config, "output_router_logits")
    assert "output_router_logits" not in config.to_dict()
    assert not hasattr(MoRConfig(output_router_logits=True), "output_router_logits")


def test_positions_that_start_again_are_documents() -> None:
    """What ``DataCollatorWithFlattening`` sends: one row, positions from 0 for every document."""
    model = make_model(small_config("threshold"), 4)
    rows = [random_ids(i, length) for i, length in enumerate((5, 1, 7))]
    collated = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    with torch.no_grad():
        packed = model(collated["input_ids"], position_ids=collated["position_ids"])
        alone = [model(row[None], use_cache=False).logits[0] for row in rows]
    assert_close(packed.logits[0], torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert packed.past_key_values is None


def test_shifted_positions_are_one_document() -> None:
    positions = torch.arange(3, 9)[None]
    assert packed_documents(positions, None, None) is None
    assert packed_documents(torch.zeros(2, 1), None, None) is None
    again = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    found = packed_documents(again, None, None)
    assert found is not None
    assert found.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert packed_documents(again, torch.ones(2, 5), None) is None
