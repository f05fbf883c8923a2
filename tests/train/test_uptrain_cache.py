"""A teacher that was run once: as good as live, grown where short, refused where wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.errors import MorError
from mor.hf.load import load_model
from tests.train.uptraining import cached, steps_of


def test_a_cached_teacher_is_the_live_one(
    uptrain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = steps_of(uptrain(distill={"top_k": 9}, name="live"))
    kept = steps_of(uptrain(distill=cached(tmp_path), name="kept"))
    for one, other in zip(live, kept, strict=True):
        for name in ("loss", "kd/logits", "kd/hidden", "lm_loss"):
            assert one[name] == pytest.approx(other[name], rel=5e-3), name  # float16

    def never(*args: Any) -> Any:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("mor.train.uptrain.teacher.Teacher.ask", never)
    again = steps_of(uptrain(distill=cached(tmp_path), name="again"))
    assert [e["loss"] for e in again] == [e["loss"] for e in kept]


def test_a_cache_grows_with_the_run(uptrain: Any, tmp_path: Path) -> None:
    uptrain(distill=cached(tmp_path), name="short", train={"budget": {"steps": 1}})
    manifest = tmp_path / "cache" / "manifest.json"
    first = json.loads(manifest.read_text())["count"]
    assert first == 4
    uptrain(distill=cached(tmp_path), name="longer", train={"budget": {"steps": 3}})
    assert json.loads(manifest.read_text())["count"] > first


def test_a_wrong_cache_is_refused(uptrain: Any, tmp_path: Path, source: Path) -> None:
    uptrain(distill=cached(tmp_path), name="first", train={"budget": {"steps": 1}})
    with pytest.raises(MorError, match=r"distill.cache=.*was made with top_k=9, this run has 8"):
        uptrain(distill=cached(tmp_path, top_k=8), name="second")
    with pytest.raises(MorError, match=r"made with temperature=1\.0, this run has 2\.0"):
        uptrain(distill=cached(tmp_path, temperature=2.0), name="second")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    model = load_model(other)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(other)
    with pytest.raises(MorError, match="was made with teacher="):
        uptrain(distill=cached(tmp_path, teacher=str(other)), name="second")
    (tmp_path / "cache" / "logs.bin").write_bytes(b"")
    with pytest.raises(MorError, match=r"logs.bin is missing or cut short"):
        uptrain(distill=cached(tmp_path), name="second")
