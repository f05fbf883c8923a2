"""Uptraining goes on: resumed with the same bits, and with a router as a second stage."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from mor.data import PackedDataset
from mor.errors import MorError
from mor.hf.load import load_model
from tests.tiny import SEQ_LEN
from tests.train.uptraining import as_if_killed, cached, steps_of, weights


@pytest.mark.parametrize("kept", [False, True], ids=["live", "cached"])
def test_resuming_gives_the_same_bits(uptrain: Any, tmp_path: Path, kept: bool) -> None:
    how: dict[str, Any] = {
        "model": {"router": "threshold", "router_capacity_warmup_steps": 4},
        "rates": {"routers": 10.0},
        "freeze": ["embeddings"],
        "distill": cached(tmp_path) if kept else {},
        "train": {"save_steps": 3, "save_total_limit": 9},
    }
    folder = uptrain(**copy.deepcopy(how))
    expected, entries = weights(folder), steps_of(folder)
    as_if_killed(folder, 3)
    uptrain(resume=True, **copy.deepcopy(how))
    again = weights(folder)
    assert all(again[name].equal(expected[name]) for name in expected)
    assert [e["loss"] for e in steps_of(folder)] == [e["loss"] for e in entries]
    seconds = [entry["cpu_s"] for entry in steps_of(folder)]
    assert seconds == sorted(seconds)


def test_another_teacher_is_no_resuming(uptrain: Any, tmp_path: Path, source: Path) -> None:
    folder = uptrain(train={"save_steps": 3, "save_total_limit": 9})
    as_if_killed(folder, 3)
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = load_model(other)
    torch.nn.init.normal_(model.model.norm.weight)
    shutil.copytree(source, tmp_path / "spare")
    model.save_pretrained(source)
    try:
        with pytest.raises(MorError, match="learnt from another teacher"):
            uptrain(resume=True, train={"save_steps": 3, "save_total_limit": 9})
    finally:
        shutil.rmtree(source)
        shutil.copytree(tmp_path / "spare", source)


def test_two_stages(uptrain: Any) -> None:
    """Recursive first, then a router; weights are still shared, and the layer map goes along."""
    first = uptrain(name="recursive")
    assert json.loads((first / "model" / "fold.json").read_text())["stack"] == list(range(6))
    model = {"router": "threshold", "router_capacity_warmup_steps": 3}
    second = uptrain(name="mor", start=first, model=model)
    one, two = load_model(first), load_model(second)
    assert (one.config.router, two.config.router) == ("fixed", "threshold")
    assert two.config.update_rule == "residual"
    assert len(two.model.block) == 2
    assert two.model.lm_head.weight is two.model.embed_tokens.weight
    entries = steps_of(second)
    assert entries[0]["router/mean_depth"] == pytest.approx(2.0)
    assert entries[-1]["router/mean_depth"] == pytest.approx(1.5, abs=0.1)
    started = {n: t for n, t in weights(second).items() if "router" not in n}
    assert set(started) == set(weights(first))


def test_the_second_stage_begins_where_the_first_ended(uptrain: Any, data: Path) -> None:
    first = uptrain(name="recursive")
    frozen = ["re:^model\\.(?!router)"]
    second = uptrain(
        name="mor",
        start=first,
        model={"router": "threshold"},
        freeze=frozen,
        train={"budget": {"steps": 1}, "learning_rate": 1e-9},
    )
    ids = PackedDataset(data, "train", SEQ_LEN)[0]["input_ids"][None]
    one, two = load_model(first), load_model(second)
    two.model.router.boundary.fill_(-1e4)
    with torch.no_grad():
        assert_close(two(ids).logits, one(ids).logits, rtol=1e-3, atol=1e-3)


def test_parts_that_begin_without_effect(uptrain: Any, data: Path) -> None:
    """Streams and scalars are added to a start that has none; then they are part of the model."""
    first = uptrain(name="recursive")
    parts = {"recursion_streams": 2, "recursion_scalars": True}
    quiet = {"budget": {"steps": 1}, "learning_rate": 1e-12}
    second = uptrain(name="wide", start=first, model=parts, train=quiet)
    ids = PackedDataset(data, "train", SEQ_LEN)[0]["input_ids"][None]
    one, two = load_model(first), load_model(second)
    assert two.model.seam.taken.shape == (2, 2)
    with torch.no_grad():
        assert_close(two(ids).logits, one(ids).logits, rtol=1e-5, atol=1e-5)
    third = uptrain(name="on", start=second)
    assert not load_model(third).model.seam.scalars.equal(two.model.seam.scalars)
    with pytest.raises(MorError, match=r"model.recursion_streams=3 differs .* which has 2"):
        uptrain(name="other", start=second, model={"recursion_streams": 3})
