"""Evaluation against a loop that scores one sequence at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mor import MoRForCausalLM
from mor.data import PackedDataset
from mor.data import load_tokenizer as tokenizer_of
from mor.data.samples import spread
from mor.errors import MorError
from mor.eval import evaluate
from mor.eval.evaluate import token_texts
from mor.eval.exits import score_passes
from mor.eval.passes import batches, run_pass, token_nll
from mor.model.routers.forced import forced_depths
from mor.ops import native
from tests.strategies import ROUTERS, make_model, random_ids, small_config
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def dataset(data: Path) -> PackedDataset:
    return PackedDataset(data, "validation", SEQ_LEN)


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Any:
    return tokenizer_of(data / "tokenizer")


def model_of(router: str, dataset: PackedDataset, **fields: Any) -> MoRForCausalLM:
    return make_model(small_config(router, vocab_size=dataset.index.vocab_size, **fields))


@torch.no_grad()
def one_by_one(
    model: MoRForCausalLM, dataset: PackedDataset, routing: str, max_depth: int | None = None
) -> tuple[float, list[int]]:
    """Nats per token and the depth of every token, sequence by sequence, token by token."""
    nats, depths = [], []
    for index in range(len(dataset)):
        ids = dataset[index]["input_ids"]
        output = model(ids[None], routing=routing, max_depth=max_depth, use_cache=False)
        logp = F.log_softmax(output.logits[0].double(), -1)
        nats += [-float(logp[place - 1, ids[place]]) for place in range(1, len(ids))]
        depths += output.depths[0].tolist()
    return sum(nats) / len(nats), depths


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kv_sharing", ["none", "recursive"])
def test_evaluate_is_the_plain_loop(router: str, kv_sharing: str, dataset: PackedDataset) -> None:
    model = model_of(router, dataset, kv_sharing=kv_sharing)
    found = evaluate(model, dataset, batch_size=3)
    nll, depths = one_by_one(model, dataset, "causal")
    causal = found["causal"]
    assert causal["nll"] == pytest.approx(nll, rel=1e-5)
    assert causal["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    per_byte = nll / math.log(2) / dataset.bytes_per_token
    assert causal["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
    assert causal["mean_depth"] == pytest.approx(sum(depths) / len(depths))
    active = [sum(d > depth for d in depths) / len(depths) for depth in range(3)]
    assert causal["active_fraction"] == pytest.approx(active)
    assert found["sequences"] == len(dataset)
    assert found["tokens"] == len(dataset) * (SEQ_LEN - 1)
    for cap in (1, 2, 3):
        nll, depths = one_by_one(model, dataset, "causal", cap)
        entry = found["depth_cap"][cap - 1]
        assert entry["max_depth"] == cap
        assert entry["nll"] == pytest.approx(nll, rel=1e-5)
        assert entry["mean_depth"] == pytest.approx(sum(depths) / len(depths))
        assert found["passes"][cap - 1]["nll"] == entry["nll"]
    shares = [depths.count(depth) / len(depths) for depth in range(4)]
    entropy = -sum(share * math.log(share) for share in shares if share)
    assert found["router"]["entropy"] == pytest.approx(entropy, rel=1e-5)
    mean = sum(shares[1:]) / 3
    assert found["router"]["max_vio"] == pytest.approx((max(shares[1:]) - mean) / mean, rel=1e-5)
    rows = torch.tensor(depths).view(-1, SEQ_LEN)
    dead = float((rows < 3).all(0).float().mean())
    assert found["router"]["dead_tokens"] == pytest.approx(dead)


@pytest.mark.parametrize("router", ["fixed", "threshold"])
def test_what_each_pass_puts_right_and_spoils(router: str) -> None:
    """Over texts that the model writes with two passes, so that the second is always right."""
    model = make_model(small_config(router))
    ids = model.generate(
        random_ids(0, 5, 1), max_new_tokens=20, do_sample=False, max_depth=2, eos_token_id=None
    )
    texts: Any = [{"input_ids": row} for row in ids]
    capped = [
        run_pass(model, texts, len(texts), 2, "causal", cap, keep_hits=True) for cap in (1, 2, 3)
    ]
    found = score_passes(capped)
    right = []
    for cap in (1, 2, 3):
        with torch.no_grad():
            guesses = model(ids, use_cache=False, max_depth=cap).logits.argmax(-1)
        right.append((guesses[:, :-1] == ids[:, 1:]).flatten().tolist())
    assert all(right[1])
    assert [row["max_depth"] for row in found] == [1, 2, 3]
    assert [row["nll"] for row in found] == [result.nll for result in capped]
    assert [row["accuracy"] for row in found] == pytest.approx([sum(r) / len(r) for r in right])
    assert "fixed" not in found[0]
    for row, before, after in zip(found[1:], right[:-1], right[1:], strict=True):
        pairs = list(zip(before, after, strict=True))
        assert row["fixed"] == pairs.count((False, True))
        assert row["broke"] == pairs.count((True, False))
    assert found[1]["fixed"] > 0
    assert found[2]["broke"] > 0


@pytest.mark.parametrize("router", ["expert_choice", "random"])
def test_the_leaky_number_and_its_gap(router: str, dataset: PackedDataset) -> None:
    model = model_of(router, dataset)
    found = evaluate(model, dataset, batch_size=3)
    nll, depths = one_by_one(model, dataset, "topk")
    assert found["leaky"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["leaky"]["mean_depth"] == pytest.approx(sum(depths) / len(depths))
    assert found["gap"] == pytest.approx(found["causal"]["nll"] - nll, abs=1e-5)
    assert found["gap"] != 0


def test_the_same_depths_dealt_out_by_chance(dataset: PackedDataset) -> None:
    model = model_of("expert_choice", dataset)
    count = len(dataset)
    found = evaluate(model, dataset, batch_size=count)
    ids = torch.stack([dataset[i]["input_ids"] for i in range(count)])
    with torch.no_grad():
        depths = model(ids, use_cache=False, routing="causal").depths
    assert len(depths.unique()) > 1
    deal = torch.randperm(depths.numel(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), forced_depths(model.model, depths.flatten()[deal].view_as(depths)):
        dealt = model(ids, use_cache=False, routing="causal")
    assert torch.equal(dealt.depths.flatten().sort()[0], depths.flatten().sort()[0])
    expected = float(token_nll(dealt.logits, ids[:, 1:]).double().mean())
    assert found["random_routes_nll"] == pytest.approx(expected, rel=1e-6)
    assert found["random_routes_nll"] != found["causal"]["nll"]
    assert evaluate(model_of("fixed", dataset), dataset)["random_routes_nll"] is None


@pytest.mark.parametrize("router", ["fixed", "token_choice"])
def test_without_a_look_ahead_there_is_no_leaky_number(router: str, dataset: PackedDataset) -> None:
    found = evaluate(model_of(router, dataset), dataset)
    assert found["leaky"] is None
    assert found["gap"] is None
    assert found["router"]["accuracy"] == []
    vanilla = model_of("fixed", dataset, num_recursions=1)
    found = evaluate(vanilla, dataset)
    assert found["leaky"] is None
    assert len(found["depth_cap"]) == 1
    assert found["depth_cap"][0]["nll"] == found["causal"]["nll"]


def test_accuracy_is_agreement_among_candidates(dataset: PackedDataset) -> None:
    """Depth r asks those that top-k let through depth r - 1."""
    model = model_of("expert_choice", dataset)
    found = evaluate(model, dataset, batch_size=2)["router"]["accuracy"]
    agree, asked = [0, 0, 0], [0, 0, 0]
    router = model.model.router
    with torch.no_grad():
        for index in range(len(dataset)):
            ids = dataset[index]["input_ids"][None]
            output = model(ids, routing="topk", output_router_traces=True, use_cache=False)
            for depth, trace in enumerate(output.traces):
                logits = trace.scores.decision
                let = torch.ones_like(logits, dtype=torch.bool)
                if depth:
                    let = logits > router.boundary[depth]
                agree[depth] += int((let == trace.active).sum())
                asked[depth] += logits.numel()
    assert asked == [len(dataset) * k for k in (16, 16, 10)]
    assert found == pytest.approx([a / b for a, b in zip(agree, asked, strict=True)])
    assert found[0] == 1
    assert 0 < found[1] < 1


@given(st.sampled_from(ROUTERS), st.integers(1, 9), st.integers(1, 9))
def test_batch_size_changes_nothing(
    dataset: PackedDataset, router: str, one: int, other: int
) -> None:
    model = model_of(router, dataset)
    scores = [evaluate(model, dataset, batch_size=size) for size in (one, other)]
    for name in ("nll", "mean_depth", "bits_per_byte"):
        values = [score["causal"][name] for score in scores]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert scores[0]["router"]["dead_tokens"] == scores[1]["router"]["dead_tokens"]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, dataset: PackedDataset) -> None:
    model = model_of("threshold", dataset).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, dataset, max_sequences=2)
    assert model.training == training
    assert all(bool((model.state_dict()[name] == before[name]).all()) for name in before)
    with pytest.raises(RuntimeError, match="stop"):
        evaluate(model, dataset, progress=lambda done, total: stop())
    assert model.training == training


def stop() -> None:
    raise RuntimeError("stop")


def test_max_sequences_and_progress(dataset: PackedDataset) -> None:
    seen: list[tuple[int, int]] = []
    model = model_of("expert_choice", dataset)
    found = evaluate(
        model,
        dataset,
        max_sequences=3,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (found["sequences"], found["tokens"]) == (3, 3 * (SEQ_LEN - 1))
    # Three depth caps and the leaky pass, two batches each.
    assert seen == [(n, 8) for n in range(1, 9)]


def test_what_does_not_fit(dataset: PackedDataset, data: Path) -> None:
    small = make_model(small_config("threshold"))  # 61 tokens
    with pytest.raises(MorError, match="vocabulary has 300 tokens but the model's vocab_size is"):
        evaluate(small, dataset)
    short = model_of("threshold", dataset, max_position_embeddings=SEQ_LEN - 1)
    with pytest.raises(MorError, match="seq_len=16 is past the model's max_position_embeddings=15"):
        evaluate(short, dataset)
    for name in ("batch_size", "max_sequences"):
        with pytest.raises(MorError, match=f"{name}=0 must be at least 1"):
            evaluate(model_of("threshold", dataset), dataset, **{name: 0})


def test_the_passage(dataset: PackedDataset, tokenizer: Any) -> None:
    model = model_of("expert_choice", dataset)
    found = evaluate(model, dataset, tokenizer, sample_tokens=12)["sample"]
    ids = dataset[len(dataset) // 2]["input_ids"][:12]
    assert "".join(found["tokens"]) == tokenizer.decode(ids)
    with torch.no_grad():
        output = model(ids[None], use_cache=False)
    assert found["depths"] == output.depths[0].tolist()
    assert found["nll"][0] is None
    loss = F.cross_entropy(output.logits[0, :-1], ids[1:])
    assert sum(found["nll"][1:]) / 11 == pytest.approx(float(loss), rel=1e-5)


@given(st.text(max_size=40))
def test_texts_of_tokens_add_up(tokenizer: Any, text: str) -> None:
    """Characters of several tokens too: each is written once, by the token that completes it."""
    ids = tokenizer(text).input_ids
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


@pytest.mark.skipif(native.library() is None, reason=native.missing())
def test_what_weights_of_bytes_cost(dataset: PackedDataset) -> None:
    model = model_of("threshold", dataset, head_dim=16)
    plain = evaluate(model, dataset, max_sequences=4)
    both = evaluate(model, dataset, max_sequences=4, quantization="int8")
    few = both["quantized"]
    assert few["quantization"] == "int8"
    assert few["loss"] == few["nll"] - both["causal"]["nll"]
    assert 0 < abs(few["loss"]) < 0.05
    assert both["causal"]["nll"] == plain["causal"]["nll"]
    assert "quantized" not in plain


def test_a_sample_is_spread_over_the_split(dataset: PackedDataset) -> None:
    assert spread(4, 10) == [0, 2, 5, 7]
    assert spread(3, 3) == [0, 1, 2]
    drawn = torch.cat(list(batches(dataset, 3, 2, torch.device("cpu"))))
    rows = [dataset[place]["input_ids"] for place in spread(3, len(dataset))]
    assert torch.equal(drawn, torch.stack(rows))
    assert spread(3, len(dataset))[-1] > 2
