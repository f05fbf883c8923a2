"""Exact match by difficulty, what a pass mends, and routes by chance at the same depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mor import MoRForCausalLM
from mor.cli.evaluate import sequence_length
from mor.data import DataIndex, PackedDataset, prepare
from mor.data.samples import spread
from mor.errors import MorError
from mor.eval import evaluate
from mor.eval.answers import Answers, collect_answers, rank_correlation, score_answers
from mor.model.routers.forced import forced_depths
from tests.strategies import ROUTED, make_model, small_config


@pytest.fixture(scope="module")
def hops(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("hops") / "data"
    prepare(
        "task:hops:documents=300,symbols=4,hops=3,queries_each=3", folder, validation_fraction=0.1
    )
    return PackedDataset(folder, "validation", 11, loss_on="answers")


def routed(dataset: PackedDataset, router: str) -> MoRForCausalLM:
    model = make_model(small_config(router), seed=3)
    assert model.config.vocab_size >= dataset.index.vocab_size
    return model


@pytest.mark.parametrize("router", ["fixed", "threshold", "token_choice"])
def test_counts_are_those_of_a_loop_over_single_queries(hops: PackedDataset, router: str) -> None:
    model = routed(hops, router).eval()
    result = score_answers(model, hops, max_sequences=20, batch_size=7)
    task = hops.index.task
    assert task is not None
    hits: dict[int, list[bool]] = {}
    depths: dict[int, list[int]] = {}
    every = []
    for row in spread(20, len(hops)):
        ids = hops[row]["input_ids"][None]
        with torch.no_grad():
            output = model(ids, routing="causal", use_cache=False)
        every.append(output.depths.float().mean())
        for place in range(ids.shape[1] - 1):
            token = int(ids[0, place])
            if token in task.queries:
                level = task.levels[token]
                right = int(output.logits[0, place].argmax()) == int(ids[0, place + 1])
                hits.setdefault(level, []).append(right)
                depths.setdefault(level, []).append(int(output.depths[0, place]))
    causal = result["causal"]
    assert causal["by_level"] == {k: pytest.approx(np.mean(hits[k])) for k in sorted(hits)}
    assert causal["depth_by_level"] == {k: pytest.approx(np.mean(depths[k])) for k in sorted(hits)}
    assert causal["mean_depth"] == pytest.approx(float(torch.stack(every).mean()))
    assert result["queries"] == sum(map(len, hits.values()))
    assert result["depth_cap"][-1]["exact_match"] == causal["exact_match"]
    assert len(result["depth_cap"]) == 3


def test_fixed_and_broken_add_up(hops: PackedDataset) -> None:
    result = score_answers(routed(hops, "fixed"), hops)
    for before, after in zip(result["depth_cap"], result["depth_cap"][1:], strict=False):
        gained = (after["exact_match"] - before["exact_match"]) * result["queries"]
        assert after["fixed"] - after["broke"] == pytest.approx(gained)
        assert after["query_depth"] == before["query_depth"] + 1
    assert result["random_routes"] is None


def test_chance_keeps_the_depths_and_the_other_tokens(hops: PackedDataset) -> None:
    result = score_answers(routed(hops, "threshold"), hops, batch_size=16)
    chance, causal = result["random_routes"], result["causal"]
    assert chance is not None
    assert chance["query_depth"] == pytest.approx(causal["query_depth"])
    assert chance["mean_depth"] == pytest.approx(causal["mean_depth"])
    assert chance["depth_by_level"] != causal["depth_by_level"]


@pytest.mark.parametrize("router", ROUTED)
def test_a_routers_own_depths_give_its_own_output(router: str) -> None:
    model = make_model(small_config(router), seed=5)
    ids = torch.randint(0, model.config.vocab_size, (3, 13), generator=torch.manual_seed(0))
    with torch.no_grad():
        own = model(ids, routing="causal", use_cache=False)
        with forced_depths(model.model, own.depths):
            forced = model(ids, routing="causal", use_cache=False)
        again = model(ids, routing="causal", use_cache=False)
    assert len(set(own.depths.flatten().tolist())) > 1
    assert torch.equal(forced.depths, own.depths)
    assert torch.allclose(forced.logits, own.logits, atol=1e-6)
    assert torch.equal(again.logits, own.logits)


def test_a_tasks_documents_are_read_whole_unless_told_otherwise(
    hops: PackedDataset, data: Path, tmp_path: Path
) -> None:
    config = small_config("fixed", max_position_embeddings=64)
    folder = hops.index.directory
    assert sequence_length(tmp_path, config, None, DataIndex.load(folder)) == 11
    assert sequence_length(tmp_path, config, 22, DataIndex.load(folder)) == 22
    assert sequence_length(tmp_path, config, None, DataIndex.load(data)) == 64


def test_queries_without_their_whole_document_do_not_count(tmp_path: Path) -> None:
    prepare("task:chains:documents=60,operations=2,modulus=5", tmp_path, validation_fraction=0.5)
    dataset = PackedDataset(tmp_path, "validation", 40)
    marks, end = dataset.index.task, dataset.index.eos_token_id
    assert marks is not None
    model = make_model(small_config("threshold"), seed=3)
    assert model.config.vocab_size >= dataset.index.vocab_size
    stream = [token for row in range(len(dataset)) for token in dataset[row]["input_ids"].tolist()]
    wanted, begun = [], 0
    for place, token in enumerate(stream):
        row, inside = divmod(place, 40)
        if token in marks.queries and inside < 39 and begun > 40 * row:
            said = [marks.levels[one] for one in stream[begun:place] if one in marks.levels]
            wanted.append(said[-1])
        begun = place + 1 if token == end else begun
    assert 0 < len(wanted) < sum(token in marks.queries for token in stream)
    answers = collect_answers(model, dataset, None, None, 7)
    assert answers.levels.tolist() == wanted
    with pytest.raises(MorError, match=r"no query whose document lies whole .* seq_len=3 must"):
        score_answers(model, PackedDataset(tmp_path, "validation", 3))


def test_text_has_no_answers(data: Path) -> None:
    dataset = PackedDataset(data, "validation", 16)
    with pytest.raises(MorError, match="prepared from text and has no answers"):
        score_answers(make_model(small_config("fixed")), dataset)


def test_rank_correlation_over_difficulties_takes_their_mean_depths() -> None:
    levels, depths = np.array([1, 1, 2, 2, 3, 3]), np.array([1, 2, 2, 3, 3, 4])
    score = Answers(levels, np.ones(6), depths, 2.5).score()
    assert score["level_rank_correlation"] == pytest.approx(1)
    assert score["rank_correlation"] < 0.9


def test_rank_correlation() -> None:
    rank = np.array([1, 2, 3, 4])
    assert rank_correlation(rank, np.array([10, 20, 30, 90])) == pytest.approx(1)
    assert rank_correlation(rank, -rank) == pytest.approx(-1)
    assert rank_correlation(rank, np.ones(4)) is None
    # 1.5, 1.5, 3, 4 against 1, 2, 3, 4
    assert rank_correlation(rank, np.array([1, 1, 2, 3])) == pytest.approx(0.9486833)


def test_an_evaluation_reads_the_answers_off_its_own_passes(
    hops: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = routed(hops, "threshold"), []
    forward = type(model.model).forward

    def counted(self: object, *args: object, **options: object) -> object:
        calls.append(options.get("max_depth"))
        return forward(self, *args, **options)  # type: ignore[arg-type]

    alone = score_answers(model, hops, max_sequences=8, batch_size=8)
    monkeypatch.setattr(type(model.model), "forward", counted)
    result = evaluate(model, hops, max_sequences=8, batch_size=8)
    assert result["answers"] == alone
    # One batch: the three caps, all depths dealt out by chance, training's rule, then twice for
    # the queries' depths by chance.
    assert calls == [1, 2, 3, None, None, None, None]
