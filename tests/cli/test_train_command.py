"""`mor train` and what is planned and written around it, as a user runs them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mor.cli.card import card_after_training
from mor.cli.plan import duration
from mor.errors import MorError
from mor.train.loop import Loop
from tests.cli.done import Mor, rows_of
from tests.tiny import SEQ_LEN

# Training --------------------------------------------------------------------------------------


def test_train(mor_: Mor, recipe: Path, tmp_path: Path) -> None:
    done = mor_("train", recipe, "--set", f"output={tmp_path}", "--set", "train.budget.steps=3")
    assert done.code == 0
    assert done.out == f"trained: {tmp_path / 'tiny'}\n"
    assert "step 3/3" in done.err
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["command"].startswith("mor train ")
    card = (tmp_path / "tiny" / "model" / "README.md").read_text()
    assert "causal rule, as in generation" in card


def test_a_card_that_cannot_be_written_does_not_fail_the_training(
    mor_: Mor, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MorError("no room")

    monkeypatch.setattr("mor.cli.card.write_card", refuse)
    done = mor_("train", recipe, "--set", f"output={tmp_path}")
    assert done.code == 0
    assert f"no model card: no room; mor card {tmp_path / 'tiny'} writes it" in done.err
    monkeypatch.undo()
    monkeypatch.setenv("RANK", "1")
    card_after_training(tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "model" / "README.md").exists()


def test_card(mor_: Mor, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    done = mor_("card", copy, "--max-sequences", 2)
    assert done.out.replace("\n", "") == f"written: {copy / 'model' / 'README.md'}"
    assert "The first 2 sequences of" in (copy / "model" / "README.md").read_text()
    (copy / "summary.json").unlink()
    assert "is no finished run" in mor_("card", copy).error


def test_dry_run(mor_: Mor, recipe: Path, tmp_path: Path) -> None:
    done = mor_("train", recipe, "--set", f"output={tmp_path}", "--dry-run")
    assert done.code == 0
    rows = rows_of(done.out)
    assert rows["family, router"] == "mor, threshold"
    assert rows["steps"] == "2"
    assert rows["tokens"] == f"{2 * 4 * SEQ_LEN} ({4 * SEQ_LEN} per step)"
    assert rows["unrolled layers"] == "5"
    assert re.match(r"[\d.]+ MiB without gradient checkpointing, [\d.]+ MiB with$", rows[MEMORY])
    parts = ("weights", "gradients", "AdamW", "activations, recursion 2", "logits and loss")
    assert set(parts) <= set(rows)
    assert rows["time"].startswith("not known: no log of the same recipe")
    assert not list(tmp_path.iterdir())


MEMORY = "memory of a device, estimated"


def test_dry_run_before_the_data_is_there(mor_: Mor, recipe: Path, tmp_path: Path) -> None:
    """The paper's recipes plan on any machine; what is assumed is said."""
    absent = tmp_path / "absent"
    words = ("train", "paper/360m-expert-3", "--set", f"data.path={absent}", "--dry-run")
    rows = rows_of(mor_(*words).out)
    assert rows["steps"] == "14,161"
    assert rows["data"] == f"{absent}: not there; vocabulary 49,152, assumed, that of preset 360m"
    tokens = f"{14161 * 1024 * 2048:,} tokens"
    assert rows["passes over the data"].startswith(f"1.00 assumed, of {tokens} (--data-tokens N")
    given = rows_of(mor_(*words, "--data-tokens", 15_000_000_000).out)
    assert given["passes over the data"] == "1.98, of 15,000,000,000 tokens as given"
    assert "absent does not exist" in mor_(*words, "--measure").error
    assert "belongs to --dry-run" in mor_("train", recipe, "--data-tokens", 9).error
    assert "its tokens are counted" in mor_("train", recipe, "--dry-run", "--data-tokens", 9).error
    demo = ("train", "demo/threshold", "--set", f"data.path={absent}", "--dry-run")
    assert rows_of(mor_(*demo).out)["data"] == f"{absent}: not there; vocabulary 4,096, assumed"
    # What is there and broken is no data to come.
    absent.mkdir()
    assert "is not a prepared data folder" in mor_(*words).error
    assert "does not exist" in mor_("train", "paper/360m-expert-3").error


def test_dry_run_with_a_log_and_with_a_probe(mor_: Mor, recipe: Path, run: Path) -> None:
    """It says which of the two its time comes from."""
    longer = ("--set", "train.budget.steps=9", "--set", "train.peak_flops=null")
    rows = rows_of(mor_("train", recipe, *longer, "--dry-run").out)
    assert f"(log of {run}, step 2" in rows["at a speed of"]
    assert "model FLOPs utilisation" not in rows  # the log may come from another machine
    changes = ("--set", "train.budget.steps=9", "--set", "train.gradient_checkpointing=true")
    before = sorted(run.parent.rglob("*"))
    rows = rows_of(mor_("train", recipe, *changes, "--dry-run", "--measure").out)
    assert "(probe of 3 steps on this CPU" in rows["at a speed of"]
    assert rows["model FLOPs utilisation"].endswith("%")
    assert re.search(r"MiB with gradient checkpointing, [\d.]+ MiB without$", rows[MEMORY])
    assert sorted(run.parent.rglob("*")) == before
    assert "--measure belongs to --dry-run" in mor_("train", recipe, "--measure").error


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "less than 1 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (200000, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_recipes(mor_: Mor) -> None:
    done = mor_("recipes")
    assert "demo/threshold" in done.out.splitlines()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nothing.yaml"], "recipe 'nothing.yaml' does not exist"),
        (["demo/treshold"], "did you mean demo/threshold?"),
        (["RECIPE", "--set", "train.lr=1"], "train.lr is not a field"),
        (["RECIPE", "--set", "train.batch_size=0"], "train.batch_size=0"),
        (["RECIPE", "--set", "model.router_capacities=[1,0.2,0.5]"], "rises with depth"),
        (["RECIPE", "--set", "model.num_hidden_layers=9"], "num_hidden_layers=9"),
        (["RECIPE", "--set", "data.path=nowhere"], "data folder nowhere does not exist"),
        (["RECIPE", "--set", "data.train_split=test"], "has no split 'test'"),
        (["RECIPE", "--set", "train.batch_size=9999"], "lower train.batch_size"),
        (["RECIPE", "--resume"], "finished run"),
        (["RECIPE", "--resume", "--set", "name=other"], "holds no run to resume"),
        (["RECIPE"], "already holds a run; use --resume, --overwrite or another name"),
        (["RECIPE", "--dry-run", "--set", "model.vocab_size=10"], "vocab_size=10 is smaller"),
    ],
)
def test_training_that_cannot_be(
    mor_: Mor, words: list[str], error: str, recipe: Path, run: Path
) -> None:
    before = sorted(run.parent.rglob("*"))
    done = mor_("train", *[str(recipe) if word == "RECIPE" else word for word in words])
    assert error in done.error
    assert sorted(run.parent.rglob("*")) == before


def test_ctrl_c(mor_: Mor, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    before = Loop.learn_micro_batch

    def interrupted(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.step == 0 and not os.environ.get("DONE"):
            monkeypatch.setenv("DONE", "1")
            os.kill(os.getpid(), signal.SIGINT)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", interrupted)
    words = ["train", recipe, "--set", f"output={tmp_path}"]
    done = mor_(*words)
    assert done.code == 130
    last = done.err.splitlines()[-1]
    assert "stopped at step 1 of 2" in last
    assert "--resume" in last
    assert "Traceback" not in done.err
    assert mor_(*words, "--resume").code == 0
    assert (tmp_path / "tiny" / "summary.json").is_file()
