"""The network against the reference vectors of the authors' code (tests/golden/README.md).

Every model is read through the converter, in float32. Tolerances are those of float32 sums taken in
another order, as another processor may: logits are of order 1 and come out of some 10^2 operations
each, so 1e-5 absolute; a gradient norm sums some 10^4 products, so 1e-4 relative. On the machine
that recorded the vectors the forward agrees to the last bit.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mor.hf.convert.authors import authors_plan
from tests.model.goldens import Reference, evaluate, forward_train, reference, weighted_terms

RECURSIVE = (
    "recursive_cycle_r3",
    "recursive_sequence_r3",
    "recursive_middle_cycle_r3",
    "recursive_middle_cycle_r3_kvshare",
)
EXPERT = ("mor_expert_mc_r3", "mor_expert_mc_r3_kvshare")
TOKEN = ("mor_token_mc_r3_softmax_balloss",)
ALL = ("vanilla_6l", *RECURSIVE, *EXPERT, *TOKEN)
MOR = EXPERT + TOKEN

LOGITS = {"rtol": 0, "atol": 1e-5}
LOSS = {"rel": 1e-6}
NORM = {"rel": 1e-4}


@pytest.mark.parametrize("name", ALL)
def test_unique_parameters(name: str) -> None:
    ref = reference(name)
    assert sum(p.numel() for p in ref.model.parameters()) == ref.facts["n_params_unique"]


@pytest.mark.parametrize("name", ALL)
def test_logits(name: str) -> None:
    ref = reference(name)
    torch.testing.assert_close(evaluate(ref).logits, ref.tensors["logits"], **LOGITS)


@pytest.mark.parametrize("name", ["vanilla_6l", *RECURSIVE, *TOKEN])
def test_logits_of_what_is_causal_do_not_need_topk(name: str) -> None:
    ref = reference(name)
    with torch.no_grad():
        output = ref.model.eval()(ref.tensors["input_ids"])
    torch.testing.assert_close(output.logits, ref.tensors["logits"], **LOGITS)


@pytest.mark.parametrize("name", ALL)
def test_stream_at_the_seams(name: str) -> None:
    """After embedding, prelude, each recursion, coda and the final norm."""
    ref = reference(name)
    config, tensors = ref.model.config, ref.tensors
    output = evaluate(ref)
    assert output.hidden_states is not None
    prelude, block = config.num_prelude_layers, config.num_recursion_layers
    embedded, after_prelude, *recursions = output.hidden_states[: 1 + prelude + 3]
    if not prelude:
        after_prelude, recursions = embedded, [after_prelude, *recursions]
    final = max(int(n.split(".")[1]) for n in tensors if n.startswith("hidden_states."))
    pairs = {0: embedded, prelude: after_prelude, final: output.hidden_states[-1]}
    if name in EXPERT:
        pairs |= {prelude + 1 + r: recursions[r] for r in range(3)}
        for r in range(3):
            recorded = tensors[f"hidden_after_recursion.{r}"]
            torch.testing.assert_close(recursions[r], recorded, **LOGITS)
    elif name in TOKEN:
        pairs[prelude + 1] = recursions[2]
        recorded = tensors["hidden_after_recursion.final"]
        torch.testing.assert_close(recursions[2], recorded, **LOGITS)
    else:
        # Recorded before every layer; the entry after the last layer is past the final norm.
        ends = {prelude + block * (r + 1): recursions[r] for r in range(config.num_recursions)}
        pairs |= {entry: state for entry, state in ends.items() if entry != final}
    for entry, state in pairs.items():
        torch.testing.assert_close(state, tensors[f"hidden_states.{entry}"], **LOGITS)


@pytest.mark.parametrize("name", EXPERT)
def test_expert_choice_scores_and_selections(name: str) -> None:
    ref = reference(name)
    output = evaluate(ref)
    batch, width = ref.tensors["input_ids"].shape
    traces = output.traces or ()
    assert len(traces) == 3
    depths = torch.zeros(batch, width, dtype=torch.long)
    for r, trace in enumerate(traces):
        everything = torch.arange(width).expand(batch, -1)
        candidates = everything if trace.candidates is None else trace.candidates.flat % width
        torch.testing.assert_close(trace.scores.logits, ref.tensors[f"router_logits.{r}"], **LOGITS)
        selected = candidates[trace.active].view(batch, -1)
        assert torch.equal(selected, ref.tensors[f"selected_tokens.{r}"])
        assert selected.shape[1] == ref.facts["top_k_at_24"][r]
        depths += torch.zeros_like(depths).scatter(1, selected, 1)
    assert torch.equal(output.depths, depths)


@pytest.mark.parametrize("name", EXPERT)
def test_expert_choice_accuracy_of_the_half_rule(name: str) -> None:
    ref = reference(name)
    hits = []
    for trace in evaluate(ref).traces or ():
        assert trace.scores.logits is not None
        hits.append((trace.scores.logits.sigmoid().ge(0.5) == trace.active).float().mean())
    assert torch.stack(hits).mean().item() == pytest.approx(ref.train["sampling_acc"], abs=1e-6)


@pytest.mark.parametrize("name", EXPERT)
def test_topk_leaks_exactly_as_recorded(name: str) -> None:
    """Running 12 of 24 tokens alone moves their logits by the recorded amount."""
    ref = reference(name)
    with torch.no_grad():
        short = ref.model.eval()(ref.tensors["input_ids"][:, :12], routing="topk").logits
    moved = (short - evaluate(ref).logits[:, :12]).abs().max().item()
    recorded = ref.facts["prefix_probe_12"]["max_abs_diff_of_logits_of_a_12_token_prefix_run_alone"]
    assert moved == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("name", TOKEN)
def test_token_choice_scores_gates_and_depths(name: str) -> None:
    ref = reference(name)
    output = evaluate(ref)
    start = (output.traces or ())[0]
    torch.testing.assert_close(start.scores.logits, ref.tensors["router_logits"], **LOGITS)
    torch.testing.assert_close(start.scores.gate, ref.tensors["gate_weight"], **LOGITS)
    assert torch.equal(output.depths, ref.tensors["selected_tokens"] + 1)
    assert output.depths is not None
    assert output.depths.flatten().bincount()[1:].tolist() == ref.facts["expert_counts"]
    share = output.depths.flatten().bincount()[1:] / output.depths.numel()
    assert share.tolist() == pytest.approx(ref.train["balancing_ratio"])


@pytest.mark.parametrize("name", ALL)
def test_language_model_loss(name: str) -> None:
    ref = reference(name)
    mean = forward_train(ref).lm_loss
    as_trained = forward_train(ref, items=ref.train["num_items_in_batch"]).lm_loss
    assert mean.item() == pytest.approx(ref.train["lm_loss_mean_over_46_targets"], **LOSS)
    assert as_trained.item() == pytest.approx(
        ref.train["lm_loss_trainer(sum_ce/num_items)"], **LOSS
    )


@pytest.mark.parametrize("name", MOR)
def test_router_losses_and_their_total(name: str) -> None:
    ref = reference(name)
    output = forward_train(ref, items=ref.train["num_items_in_batch"])
    recorded = {
        "aux_loss": ref.train["sampling_loss"],
        "balancing_loss": ref.train["balancing_loss"],
        "z_loss": ref.train["router_z_loss"],
    }
    found = {n: t.item() for n, t in (output.router_losses or {}).items()}
    # What the record has as 0 was off, and is not computed here.
    assert found == pytest.approx({n: v for n, v in recorded.items() if v}, rel=1e-5)
    total = (output.lm_loss + weighted_terms(ref, output)).item()
    assert total == pytest.approx(ref.train["total_loss_as_trainer_weighs_it"], **LOSS)
    # Ours weighs router terms, like the rest, by this micro-batch's share of the step's targets.
    share = (ref.tensors["labels"][:, 1:] != -100).sum() / ref.train["num_items_in_batch"]
    expected = output.lm_loss + share * weighted_terms(ref, output)
    assert output.loss.item() == pytest.approx(expected.item(), **LOSS)
    alone = forward_train(ref)
    expected = alone.lm_loss + weighted_terms(ref, alone)
    assert alone.loss.item() == pytest.approx(expected.item(), **LOSS)


def compare_gradient_norms(ref: Reference, recorded: dict[str, float]) -> None:
    """Norm of every gradient under their name; a shared tensor is recorded once, by its first."""
    gradients = {name: p.grad for name, p in ref.model.named_parameters()}
    found = {}
    for (ours, index), names in authors_plan(ref.model.config).items():
        gradient = gradients[ours]
        assert gradient is not None, ours
        found[names[0]] = (gradient if index is None else gradient[index]).norm().item()
    assert found.keys() == recorded.keys()
    assert found == pytest.approx(recorded, **NORM)


@pytest.mark.parametrize("name", ALL)
def test_gradients_of_the_mean_language_model_loss(name: str) -> None:
    ref = reference(name)
    forward_train(ref).lm_loss.backward()
    compare_gradient_norms(ref, ref.train["grad_norms_of_mean_lm_loss"])
    norms = torch.stack([p.grad.norm() for p in ref.model.parameters() if p.grad is not None])
    recorded_total = ref.train["grad_total_norm_mean_lm_loss"]
    assert norms.norm().item() == pytest.approx(recorded_total, **NORM)
    gradients = {name: p.grad for name, p in ref.model.named_parameters()}
    compared = 0
    for (ours, index), names in authors_plan(ref.model.config).items():
        recorded = ref.tensors.get(f"grad_mean_lm_loss.{names[0]}")
        if recorded is not None:
            gradient = gradients[ours] if index is None else gradients[ours][index]
            torch.testing.assert_close(gradient, recorded, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared == sum(n.startswith("grad_mean_lm_loss.") for n in ref.tensors)


@pytest.mark.parametrize("name", MOR)
def test_gradients_of_the_total_loss(name: str) -> None:
    ref = reference(name)
    output = forward_train(ref, items=ref.train["num_items_in_batch"])
    (output.lm_loss + weighted_terms(ref, output)).backward()
    compare_gradient_norms(ref, ref.train["grad_norms_official_trainer_step(total)"])


@pytest.mark.parametrize("name", EXPERT)
@pytest.mark.parametrize("pieces", [(2, 2), (1, 1, 1, 1), (1, 3)], ids=str)
def test_loss_and_gradients_are_the_same_for_any_split_into_micro_batches(
    name: str, pieces: tuple[int, ...]
) -> None:
    """The authors' auxiliary loss grows with the number of micro-batches; ours does not."""
    model = copy.deepcopy(reference(name).model)
    # Weights at which either term would be seen if it were counted once per piece.
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.5, 0.5
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (4, 24))
    items = ids.numel()

    def step(sizes: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for part in ids.split(list(sizes)):
            loss = model(part, labels=part, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters()}

    whole_loss, whole = step((4,))
    split_loss, split = step(pieces)
    assert split_loss == pytest.approx(whole_loss, rel=1e-6)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(split[parameter], gradient, rtol=1e-4, atol=1e-6)
