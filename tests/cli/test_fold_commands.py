"""``mor convert gguf``, ``mor fold`` and ``mor fold-table`` as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mor.hf.load import load_model
from tests.cli.done import Mor
from tests.hf.folding import save_vanilla
from tests.hf.gguf_files import model_of, write_gguf


@pytest.fixture
def source(tmp_path: Path, mor_: Mor) -> Path:
    """A GGUF file of 7 layers, converted: six pairs of depths to fold, and a tokenizer."""
    file = write_gguf(tmp_path / "tiny.gguf", model_of(num_hidden_layers=7))
    done = mor_("convert", "gguf", file, "--out", tmp_path / "source")
    assert done.code == 0, done.err
    assert done.out.strip() == f"converted: {tmp_path / 'source'}"
    return tmp_path / "source"


def test_fold(source: Path, tmp_path: Path, mor_: Mor) -> None:
    out = tmp_path / "out"
    done = mor_(
        *("fold", source, "--out", out, "--num-recursions", 2, "--init", "average"),
        *("--relaxation", "lora", "--rank", "full", "--router", "threshold"),
        *("--capacities", "1,0.25", "--capacity-warmup-steps", 7),
    )
    assert (done.code, done.out.strip()) == (0, f"folded: {out}")
    assert done.err.strip() == (
        "note: num_layers=7 with sharing='middle_cycle' has 5 layers to share, which "
        "num_recursions=2 does not divide: thinned to 6 layers"
    )
    config = load_model(out).config
    assert (config.family, config.num_hidden_layers) == ("mor", 6)
    assert config.router_capacities == [1.0, 0.25]
    assert config.router_capacity_warmup_steps == 7
    assert config.relaxation_rank == 64
    assert json.loads((out / "fold.json").read_text())["init"] == "average"
    assert mor_("generate", out, "--prompt", "the", "--max-new-tokens", 3).code == 0


def cells(text: str) -> list[list[str]]:
    return [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in text.splitlines() if "│" in line]


def test_the_table_before_training(source: Path, tmp_path: Path, mor_: Mor) -> None:
    text, kept = tmp_path / "text.txt", tmp_path / "rows.json"
    text.write_text("in the 12 thin things, the inn. " * 40)
    done = mor_(
        *("fold-table", source, "--text", text, "--sharing", "cycle,middle_cycle"),
        *("--num-recursions", 2, "--init", "step,average", "--rank", "0,full"),
        *("--seq-len", 16, "--max-tokens", 64, "--out", kept),
    )
    assert done.code == 0, done.err
    rows = cells(done.out)
    assert len(rows) == 1 + 2 * 2 * 2
    assert rows[0][:4] == ["source", "1", "-", "-"]
    assert rows[1][:6] == ["cycle", "2", "stepwise", "shared", "-", "6"]
    assert rows[2][:6] == ["cycle", "2", "stepwise", "own", "full", "6"]
    nll = {tuple(row[:5]): float(row[7]) for row in rows}
    # Full rank is the thinned source, however the shared layers started.
    for sharing in ("cycle", "middle_cycle"):
        # Other products come to it, so that the last digit printed may be another.
        full = nll[sharing, "2", "average", "own", "full"]
        assert nll[sharing, "2", "stepwise", "own", "full"] == pytest.approx(full, abs=1.5e-4)
        assert (
            nll[sharing, "2", "stepwise", "shared", "-"]
            != nll[sharing, "2", "average", "shared", "-"]
        )
    saved: list[dict[str, Any]] = json.loads(kept.read_text())["rows"]
    assert [f"{row['nll']:.4f}" for row in saved] == [row[7] for row in rows]
    assert saved[0]["folding"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "some"), "rank='some' must be a whole number"),
        (("--capacities", "1,half"), "capacities='1,half' must be numbers"),
        (("--num-recursions", "9"), "num_recursions=9 needs at least 11 layers"),
    ],
)
def test_fold_says_what_does_not_fit(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    mor_: Mor,
) -> None:
    save_vanilla(tmp_path / "in")
    done = mor_("fold", tmp_path / "in", "--out", tmp_path / "out", *words)
    assert message in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --text FILE or --data DIR"),
        (("--text", "{}/none.txt"), "none.txt cannot be read as UTF-8 text"),
        # The model takes 128 tokens, fewer than the 512 that a table has else.
        (
            ("--text", "{}/short.txt"),
            "fewer than one sequence of seq_len=128",
        ),
        (
            ("--text", "{}/short.txt", "--seq-len", "129"),
            "seq_len=129 must be a whole number",
        ),
        (("--text", "{}/short.txt", "--sharing", "spiral"), "sharing='spiral' is not known"),
        (("--text", "{}/short.txt", "--rank", "some"), "rank='some' is not known"),
    ],
)
def test_the_table_says_what_does_not_fit(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    source: Path,
    mor_: Mor,
) -> None:
    (tmp_path / "short.txt").write_text("in")
    done = mor_("fold-table", source, *(word.format(tmp_path) for word in words))
    assert message in done.error


def test_the_table_of_what_can_be_left_out(
    tmp_path: Path,
    source: Path,
    mor_: Mor,
) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 50}" for i in range(80)))
    words = ("fold-table", source, "--text", tmp_path / "text.txt", "--seq-len", "16")
    done = mor_(*words, "--leave-out", "4")
    assert done.code == 0, done.err
    rows = cells(done.out)
    assert [row[0] for row in rows[1:]] == [f"no {k}-{k + 3}" for k in range(1, 4)]
    assert [row[5] for row in rows] == ["7", "3", "3", "3"]
    best = min(rows[1:], key=lambda row: float(row[7]))
    assert f"misses layers {best[0].removeprefix('no ')} least: NLL {best[7]}" in done.out
    assert "leave_out=7 must be 1 to 6" in mor_(*words, "--leave-out", "7").error
