"""Levels: calibrated capacities that a request chooses from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from mor.data import PackedDataset
from mor.data.samples import spread
from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.eval import calibrate, evaluate
from mor.eval.calibrate import count_ticks
from mor.eval.levels import calibrate_levels
from mor.folder.levels import FILE, Level, Levels, load_levels
from tests.strategies import make_model, small_config
from tests.tiny import SEQ_LEN


@pytest.fixture(scope="module")
def dataset(data: Path) -> Dataset:
    return PackedDataset(data, "train", SEQ_LEN)


@pytest.mark.parametrize("router", ["threshold", "expert_choice"])
def test_each_level_runs_its_share_in_the_engine(dataset: Any, router: str) -> None:
    model = make_model(small_config(router, vocab_size=dataset.index.vocab_size), 1)
    stored, before = model.model.router.boundary.clone(), evaluate(model, dataset, max_sequences=8)
    levels = calibrate_levels(model, dataset, factors=(0.25, 1.0, 1.4), max_sequences=8)
    assert model.model.router.boundary.equal(stored)
    assert evaluate(model, dataset, max_sequences=8)["causal"] == before["causal"]
    engine = Engine(model)
    prompts = [dataset[i]["input_ids"].tolist() for i in spread(8, len(dataset))]
    means = []
    for level in levels.levels:
        assert level.capacities[0] == 1.0
        params = SamplingParams(max_tokens=1, boundaries=levels.boundaries(level.capacity))
        outputs = engine.generate(prompts, params)
        depths = [d for output in outputs for d in output.completions[0].prompt_depths]
        for depth, share in enumerate(level.capacities):
            assert sum(d > depth for d in depths) / len(depths) == pytest.approx(share, abs=0.03)
        means.append(sum(depths) / len(depths))
    between = SamplingParams(max_tokens=1, boundaries=levels.boundaries(0.6))
    outputs = engine.generate(prompts, between)
    depths = [d for output in outputs for d in output.completions[0].prompt_depths]
    assert means[0] < sum(depths) / len(depths) < means[1] < means[2]


def test_levels_survive_a_file(tmp_path: Path) -> None:
    levels = Levels((Level(0.5, (1.0, 0.3), (0.0, 2.0)), Level(1.5, (1.0, 0.9), (0.0, -2.0))))
    assert load_levels(tmp_path) is None
    (tmp_path / "model").mkdir()
    levels.save(tmp_path / "model")
    assert load_levels(tmp_path) == load_levels(tmp_path / "model") == levels
    assert levels.boundaries(0.5) == (0.0, 2.0)
    assert levels.boundaries(0.75) == (0.0, 1.0)
    assert levels.boundaries(1.5) == (0.0, -2.0)
    for wrong in (0.49, 1.51, float("nan")):
        with pytest.raises(MorError, match=r"0\.5\.\.1\.5"):
            levels.boundaries(wrong)
    file = tmp_path / "model" / FILE
    for text in ("{", "[]", '[{"capacity": 1}]', json.dumps([{"capacity": 1}] * 2)):
        file.write_text(text)
        with pytest.raises(MorError):
            load_levels(tmp_path)


def test_what_is_refused(dataset: Any) -> None:
    model = make_model(small_config("token_choice", vocab_size=dataset.index.vocab_size))
    with pytest.raises(MorError, match="stores no boundaries"):
        calibrate_levels(model, dataset, max_sequences=2)
    with pytest.raises(MorError, match="above 0"):
        calibrate_levels(model, dataset, factors=(0.0, 1.0))


def test_levels_share_their_passes_and_tell_how_far_they_are(
    dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depth 1 is asked about once for all levels, and no pass makes logits."""
    model = make_model(small_config("threshold", vocab_size=dataset.index.vocab_size), 1)
    alone = [
        calibrate(
            copy.deepcopy(model), dataset, max_sequences=8, capacities=[1.0, 2 * c / 3, c / 3]
        )
        for c in (0.5, 1.0, 1.4)
    ]
    passes: list[int] = []
    forward = type(model.model).forward

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        passes.append(options["max_depth"])
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model.model), "forward", counted)
    monkeypatch.setattr(type(model), "forward", None)  # logits
    ticks: list[int] = []
    levels = calibrate_levels(
        model, dataset, factors=(0.5, 1.0, 1.4), max_sequences=8, tick=lambda: ticks.append(1)
    )
    assert passes == [2, 3, 3, 3]
    assert len(ticks) == 3 * count_ticks(model.config.router_capacities, 8, 8) == 6
    assert [list(level.boundaries) for level in levels.levels] == alone
