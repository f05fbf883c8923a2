"""Two processes uptrain as one does, with a teacher that was run once."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.testing import assert_close

from mor.train import parse_recipe, train
from tests.processes import run_ranks
from tests.train.uptraining import cached, fields, steps_of, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def on_two_ranks(raw: dict[str, Any], folder: Path) -> Path:
    """The run folder of the recipe ``raw``, trained by two processes."""
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(raw | {"name": "two"}))
    run_ranks(["uptrain", str(file)], 2, folder / "said.txt")
    return folder / "two"


def test_two_ranks_are_one(data: Path, tmp_path: Path, source: Path, folded: Path) -> None:
    distill = cached(tmp_path, lm=0.5)
    raw = fields(data, tmp_path, source, folded, distill=distill)
    raw["train"] |= {"budget": {"steps": 3}, "global_batch_size": 4}
    del raw["train"]["gradient_accumulation_steps"]
    one = train(parse_recipe(copy.deepcopy(raw) | {"name": "one"}))
    count = json.loads((tmp_path / "cache" / "manifest.json").read_text())["count"]
    two = on_two_ranks(raw, tmp_path)
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["count"] == count
    for ours, theirs in zip(steps_of(two), steps_of(one), strict=True):
        for name in ("loss", "lm_loss", "kd/logits", "kd/hidden"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(one)
    for name, tensor in weights(two).items():
        assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(("hidden", "near"), [(0.0, 1e-5), (1.0, 1e-3)])
def test_two_ranks_route_as_one(
    hidden: float, near: float, data: Path, tmp_path: Path, source: Path, folded: Path
) -> None:
    """The streams of routed tokens are averaged on each rank, so that there they are only near."""
    raw = fields(
        data,
        tmp_path,
        source,
        folded,
        distill={"lm": 0.5, "hidden": hidden},
        model={"router": "threshold", "router_capacity_warmup_steps": 2},
    )
    del raw["train"]["gradient_accumulation_steps"]
    raw["train"] |= {"budget": {"steps": 4}, "global_batch_size": 4}
    whole = copy.deepcopy(raw) | {"name": "one"}
    whole["train"]["batch_size"] = 4
    one, two = train(parse_recipe(whole)), on_two_ranks(raw, tmp_path)
    for ours, theirs in zip(steps_of(two), steps_of(one), strict=True):
        for name in ("loss", "lm_loss", "kd/logits"):
            assert ours[name] == pytest.approx(theirs[name], rel=near), name
    assert steps_of(two)[-1]["router/mean_depth"] < steps_of(two)[0]["router/mean_depth"]
