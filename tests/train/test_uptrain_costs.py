"""What a dry run says of teachers and frozen weights, against the run itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mor import MoRConfig
from mor.hf.load import load_model
from mor.model.flops import count_parameters, flops_per_token
from mor.train import parse_recipe, train
from mor.train.plan.memory import estimate_memory
from mor.train.plan.probe import logged_speed
from mor.train.uptrain.costs import uptrain_costs
from mor.train.uptrain.start import resolve_model
from tests.tiny import SEQ_LEN
from tests.train.uptraining import cached, fields


def test_against_the_run(data: Path, tmp_path: Path, source: Path, folded: Path) -> None:
    raw = fields(data, tmp_path / "runs", source, folded, freeze=["embeddings", "norms"])
    recipe = resolve_model(parse_recipe(raw))
    config = MoRConfig.from_pretrained(folded)
    costs = uptrain_costs(recipe, config)
    folder = train(recipe)
    summary = json.loads((folder / "summary.json").read_text())
    assert costs.trained == summary["trained_parameters"]
    model = load_model(folded)
    still = sum(
        p.numel() for n, p in model.named_parameters() if "embed" in n or n.endswith("norm.weight")
    )
    assert costs.trained == count_parameters(config)[0] - still
    teacher = load_model(source)
    assert costs.teacher_parameters == sum(p.numel() for p in teacher.parameters())
    flops = flops_per_token(teacher.config, SEQ_LEN)
    assert costs.teacher_flops == flops.forward
    assert summary["teacher_flops"] == flops.forward * summary["tokens"]
    assert logged_speed(recipe) is not None
    # Without the teacher it would be faster.
    alone = {**raw, "uptrain": raw["uptrain"] | {"distill": None}}
    assert logged_speed(resolve_model(parse_recipe(alone))) is None


@pytest.mark.parametrize("where", ["layers", "depths"])
def test_what_is_asked_for_costs(
    where: str, data: Path, tmp_path: Path, source: Path, folded: Path
) -> None:
    def of(**distill: object) -> float:
        raw = fields(data, tmp_path, source, folded, distill={"hidden_at": where, **distill})
        return uptrain_costs(resolve_model(parse_recipe(raw)), config).teacher_bytes

    config = MoRConfig.from_pretrained(folded)
    theirs = MoRConfig.from_pretrained(source)
    streams = config.num_hidden_layers if where == "layers" else 1 + 2 + 1
    width, tokens = theirs.hidden_size, 2 * SEQ_LEN
    assert of(hidden=1.0) - of(hidden=0.0) == 4 * tokens * streams * width
    logits = tokens * (width + 2 * theirs.vocab_size)
    assert of(logits=1.0) - of(logits=0.0) == 4 * logits
    assert of(logits=0.0, hidden=1.0) > 4 * count_parameters(theirs)[0]


def test_a_cache_and_no_teacher(data: Path, tmp_path: Path, source: Path, folded: Path) -> None:
    config = MoRConfig.from_pretrained(folded)
    raw = fields(data, tmp_path, source, folded, distill=cached(tmp_path))
    assert uptrain_costs(resolve_model(parse_recipe(raw)), config).cached
    raw["uptrain"]["distill"] = None
    alone = uptrain_costs(resolve_model(parse_recipe(raw)), config)
    assert alone.teacher_bytes == alone.teacher_flops == alone.teacher_parameters == 0
    assert alone.trained == count_parameters(config)[0]


def test_frozen_weights_have_no_gradients_nor_means(folded: Path) -> None:
    config = MoRConfig.from_pretrained(folded)
    total = count_parameters(config)[0]
    whole, part = (estimate_memory(config, 2, 16, trained=t) for t in (None, total - 1000))
    assert whole.total - part.total == 3 * 4 * 1000
    assert estimate_memory(config, 2, 16, teacher=5.0).total == whole.total + 5
