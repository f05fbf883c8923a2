"""Two processes uptrain as one does, with a teacher that was run once."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import yaml
from torch.testing import assert_close

from mor.train import parse_recipe, train
from tests.processes import run_group
from tests.train.uptraining import cached, fields, steps_of, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]


def test_two_ranks_are_one(data: Path, tmp_path: Path, source: Path, folded: Path) -> None:
    distill = cached(tmp_path, lm=0.5)
    raw = fields(data, tmp_path, source, folded, distill=distill)
    raw["train"] |= {"budget": {"steps": 3}, "global_batch_size": 4}
    del raw["train"]["gradient_accumulation_steps"]
    one = train(parse_recipe(copy.deepcopy(raw) | {"name": "one"}))
    count = json.loads((tmp_path / "cache" / "manifest.json").read_text())["count"]
    raw |= {"name": "two"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(raw))
    run_group(
        [
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "mor.cli", "uptrain", str(tmp_path / "two.yaml")),
        ],
        timeout=300,
    )
    two = tmp_path / "two"
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["count"] == count
    for ours, theirs in zip(steps_of(two), steps_of(one), strict=True):
        for name in ("loss", "lm_loss", "kd/logits", "kd/hidden"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(one)
    for name, tensor in weights(two).items():
        assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)
