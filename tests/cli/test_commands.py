"""Every command as a user runs it: what it does, what it says, how it ends."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import mor
from mor.cli import main
from mor.cli.app import describe
from mor.cli.card import card_after_training
from mor.cli.plan import duration
from mor.data import DataIndex, PackedDataset, ShardWriter, prepare
from mor.errors import MorError
from mor.eval import evaluate
from mor.hf.generate import generate_with_depths
from mor.hf.load import load_model, load_tokenizer
from mor.train.loop import Loop
from tests.strategies import make_model, random_ids, small_config
from tests.tiny import SEQ_LEN, tiny_fields, write_corpus


@dataclass
class Done:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that said why it failed, after bars of the work until then."""
        assert self.code == 2, self
        *before, last = self.err.strip().splitlines()
        assert all("━" in line for line in before), self.err
        assert last.startswith("error: ")
        return last.removeprefix("error: ")


Mor = Callable[..., Done]


@pytest.fixture
def mor_(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """``mor_("eval", folder)`` runs a command in this process, as the console script does."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MOR_DEBUG", raising=False)
    verbosity = logging.get_verbosity()

    def run(*words: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["mor", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int) or code is None
        return Done(code or 0, out, err)

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that trains two steps into its own folder."""
    root = tmp_path_factory.mktemp("recipes")
    fields = tiny_fields(data, root / "runs", "threshold")
    fields["train"] |= {"budget": {"steps": 2}}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="session")
def run(recipe: Path) -> Path:
    """A finished run; read only."""
    from mor.train import load_recipe, train

    return train(load_recipe(recipe))


# Data ------------------------------------------------------------------------------------------


def test_data(mor_: Mor, tmp_path: Path) -> None:
    source, out = write_corpus(tmp_path / "text"), tmp_path / "out"
    done = mor_("data", "prepare", source, "--out", out, "--vocab-size", 300)
    assert done.code == 0
    assert f"prepared: {out}" in done.out.replace("\n", "")
    assert (
        "already prepared" in mor_("data", "prepare", source, "--out", out, "--vocab-size", 300).out
    )
    info = mor_("data", "info", out)
    assert "train" in info.out
    assert "validation" in info.out
    assert mor_("data", "verify", out).out.splitlines() == [
        "ok train-00000.bin",
        "ok validation-00000.bin",
    ]
    shard = out / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[70] ^= 1
    shard.write_bytes(content)
    assert "train-00000.bin is damaged" in mor_("data", "verify", out).error


def test_data_as_a_stream(mor_: Mor, data: Path, tmp_path: Path) -> None:
    """A dataset in the hub's form, a given tokenizer, a limit; damage of two shards named."""
    (tmp_path / "set").mkdir()
    texts = [f"Scene {n}. The king said to thee, my lord." for n in range(60)]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "set" / "train.parquet")
    out = tmp_path / "out"
    words = ["data", "prepare", f"hf:{tmp_path / 'set'}", "--out", out, "--text-field", "body"]
    words += ["--validation-fraction", 0.3, "--shard-tokens", 200]
    assert "--tokenizer DIR" in mor_(*words).error
    words += ["--tokenizer", data / "tokenizer", "--max-documents", 40]
    assert mor_(*words).code == 0
    index = DataIndex.load(out)
    assert index.num_documents("train") + index.num_documents("validation") == 40
    assert "already prepared" in mor_(*words).out
    for name in ("train-00000.bin", "validation-00000.bin"):
        content = bytearray((out / name).read_bytes())
        content[70] ^= 1
        (out / name).write_bytes(content)
    error = mor_("data", "verify", out).error
    assert error.count("is damaged: its SHA-256 is") == 2
    assert "train-00000.bin" in error
    assert "validation-00000.bin" in error
    assert "or prepare the data again (it was made by: mor data prepare hf:" in error


def test_preparing_interrupted(mor_: Mor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_corpus(tmp_path / "text"), tmp_path / "out"
    words = ["data", "prepare", source, "--out", out, "--vocab-size", 300, "--shard-tokens", 99]
    whole = ShardWriter.append

    def append(self: ShardWriter, *args: Any) -> None:
        if "00002" in self.path.name:
            raise KeyboardInterrupt
        whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", append)
        done = mor_(*words)
    assert done.code == 130
    assert "the same command goes on from there" in done.err
    assert not out.exists()
    assert mor_(*words).code == 0


@pytest.mark.parametrize("text", [None, ""])
def test_data_without_text(mor_: Mor, text: str | None, tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    if text is not None:
        source.write_text(text)
    out = tmp_path / "out"
    assert str(source) in mor_("data", "prepare", source, "--out", out).error
    assert not out.exists()
    assert [p for p in tmp_path.iterdir() if p != source] == []


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


def rows_of(table: str) -> dict[str, str]:
    """The cells of a table of two columns."""
    return {
        cells[1].strip(): cells[2].strip()
        for line in table.splitlines()
        if len(cells := line.split("│")) == 4
    }


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
    rows = rows_of(mor_("train", recipe, "--set", "train.budget.steps=9", "--dry-run").out)
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


# Evaluation ------------------------------------------------------------------------------------


def test_eval(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    done = mor_("eval", run, "--data", data, "--json", "--out", tmp_path / "eval.json")
    assert done.code == 0
    assert done.err == f"kept: {run / 'eval.json'}\n"
    found = json.loads(done.out)
    assert json.loads((tmp_path / "eval.json").read_text()) == found
    dataset = PackedDataset(data, "validation", SEQ_LEN)  # a run folder's own seq_len
    expected = evaluate(load_model(run), dataset)
    assert found["causal"] == expected["causal"]
    assert found["leaky"] == expected["leaky"]
    assert found["seq_len"] == SEQ_LEN
    assert found["command"].startswith("mor eval ")
    assert len(found["sample"]["tokens"]) == SEQ_LEN


def test_eval_table(mor_: Mor, run: Path, data: Path) -> None:
    done = mor_("eval", run, "--data", data, "--max-sequences", 2, "--seq-len", 8)
    assert done.code == 0
    for words in (
        "causal",
        "leaky top-k (looks ahead, not causal)",
        "at most 1 recursion",
        "causal minus leaky",
    ):
        assert words in done.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere", "--data", "DATA"], "model folder 'nowhere' does not exist"),
        (["DATA", "--data", "DATA"], "is no model folder"),
        (["RUN", "--data", "RUN"], "is not a prepared data folder"),
        (["RUN", "--data", "DATA", "--split", "test"], "has no split 'test'"),
        (["RUN", "--data", "DATA", "--seq-len", "99999"], "shorten seq_len"),
        (["RUN", "--data", "DATA", "--seq-len", "65"], "max_position_embeddings=64"),
        (["RUN", "--data", "DATA", "--out", "no/such/x.json"], "out=no/such/x.json"),
    ],
)
def test_evaluation_that_cannot_be(
    mor_: Mor, words: list[str], error: str, run: Path, data: Path
) -> None:
    places = {"RUN": run, "DATA": data}
    assert error in mor_("eval", *[places.get(word, word) for word in words]).error


def test_the_datas_tokenizer_is_the_models(
    mor_: Mor, run: Path, data: Path, tmp_path: Path
) -> None:
    """Of equal size, yet other words: the score would be of nonsense."""
    words = " ".join(f"{letter}{letter}q" for letter in "abcdefghijklmnopqrstuvwxyz" * 4)
    (tmp_path / "a.txt").write_text(words)
    (tmp_path / "b.txt").write_text(words[::-1])
    other = prepare(tmp_path, tmp_path / "data", vocab_size=300, validation_fraction=0.5)
    assert other.vocab_size == 300
    for command in (["eval"], ["calibrate", "--out", tmp_path / "out", "--split", "validation"]):
        done = mor_(*command, run, "--data", other.directory)
        assert "was prepared with another tokenizer" in done.error
        assert f"--tokenizer {run / 'model'}" in done.error
    assert not (tmp_path / "out").exists()
    # A checkpoint that came without a tokenizer is read by the data's.
    bare = Path(shutil.copytree(run / "model", tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    found = json.loads(mor_("eval", bare, "--data", data, "--seq-len", 16, "--json").out)
    assert found["causal"] == json.loads(mor_("eval", run, "--data", data, "--json").out)["causal"]
    assert "holds no tokenizer" in mor_("generate", bare).error


def test_calibrate_by_confidence(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    done = mor_("calibrate", run, "--confidence", 0.25, "--out", tmp_path / "sure")
    assert "surer than 0.25" in done.out
    boundary = load_model(tmp_path / "sure").model.router.boundary
    assert boundary.tolist() == pytest.approx([-1.0986123] * len(boundary))
    assert (tmp_path / "sure" / "tokenizer.json").is_file()
    for wrong in ([], ["--confidence", 1.5], ["--confidence", 0.2, "--data", data]):
        refused = mor_("calibrate", run, *wrong, "--out", tmp_path / "no")
        assert refused.code == 2, wrong
        assert "confidence" in refused.error
    assert not (tmp_path / "no").exists()


def test_calibrate(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    done = mor_("calibrate", run, "--data", data, "--out", out, "--capacity", "1,0.5,0.25")
    assert done.code == 0
    assert "boundaries" in done.out
    model = load_model(out)
    assert model.config.router_capacities == [1, 0.5, 0.25]
    scored = json.loads(
        mor_("eval", out, "--data", data, "--split", "train", "--seq-len", SEQ_LEN, "--json").out
    )
    assert scored["causal"]["active_fraction"] == pytest.approx([1, 0.5, 0.25], abs=0.02)
    assert "nothing is overwritten" in mor_("calibrate", run, "--data", data, "--out", out).error
    words = ["calibrate", run, "--data", data, "--out", tmp_path / "new", "--seq-len", 65]
    assert "max_position_embeddings=64" in mor_(*words).error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("capacity", ["1,0.25,0.5", "1,0.5", "nan,0.5,0.2", "2,1,1"])
def test_capacities_that_cannot_be(
    mor_: Mor, capacity: str, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = mor_("calibrate", run, "--data", data, "--out", out, "--capacity", capacity)
    assert "router_capacities" in done.error
    assert not list(tmp_path.iterdir())
    assert mor_("calibrate", run, "--data", data, "--out", out, "--capacity", "1;2").code == 2


# Generation ------------------------------------------------------------------------------------


def test_generate_is_generate(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "the king", "--max-new-tokens", 9, "--greedy", "--json"]
    words += ["--ignore-eos"]
    found = json.loads(mor_(*words).out)
    model, tokenizer = load_model(run), load_tokenizer(run)
    ids = tokenizer("the king", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert found["prompt"] == "the king"
    # A token's depth is that of the place it was said from.
    depths = model(expected[:, :-1], use_cache=False).depths[0, ids.shape[1] - 1 :].tolist()
    assert found["depths"] == depths
    assert found["mean_depth"] == pytest.approx(sum(depths) / 9)
    assert json.loads(mor_(*words).out)["token_ids"] == found["token_ids"]


def test_depths_are_those_of_the_places_tokens_are_said_from() -> None:
    model = make_model(small_config("threshold"))
    first = []
    for seed in range(8):
        prompt = random_ids(seed, 1, 7)
        ids: list[int] = []
        options = {"max_new_tokens": 5, "do_sample": False}
        tokens, depths = generate_with_depths(
            model, prompt, lambda token, depth, ids=ids: ids.append(token), **options
        )
        assert ids == tokens
        whole = torch.cat((prompt, torch.tensor([tokens])), 1)
        found = model(whole, use_cache=False).depths[0].tolist()
        assert depths == found[6:-1]
        first.append((found[0], found[6]))
    assert any(start != end for start, end in first)  # so that a wrong place would show
    with pytest.raises(ValueError, match=r"must be \[1, T\]"):
        generate_with_depths(model, random_ids(0, 2, 7))


def test_generate_streams_plain_text_into_a_pipe(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "a :heart: [b]", "--max-new-tokens", 30, "--seed", 3]
    done = mor_(*words)
    found = json.loads(mor_(*words, "--json").out)
    assert done.code == 0
    shown = load_tokenizer(run).decode(found["token_ids"], skip_special_tokens=True)
    assert done.out == f"a :heart: [b]{shown}\n"
    assert f"{len(found['token_ids'])} tokens, mean depth" in done.err


def test_sampling_follows_the_seed(mor_: Mor, run: Path) -> None:
    def ids(*words: Any) -> list[int]:
        base = ["generate", run, "--prompt", "my lord", "--max-new-tokens", 20, "--json"]
        return json.loads(mor_(*base, *words).out)["token_ids"]

    assert ids("--seed", 1) == ids("--seed", 1)
    assert ids("--seed", 1) != ids("--seed", 2)
    assert ids("--top-k", 1, "--seed", 1) == ids("--greedy")
    assert ids("--temperature", 0.001, "--min-p", 0.5) == ids("--greedy")
    assert ids("--temperature", 0) == ids("--greedy")


def test_max_depth(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "thou", "--max-new-tokens", 12, "--json"]
    assert set(json.loads(mor_(*words, "--max-depth", 1).out)["depths"]) == {1}
    assert "max_depth=4 must lie in 1..3" in mor_(*words, "--max-depth", 4).error
    assert "max_depth=0 must lie in 1..3" in mor_(*words, "--max-depth", 0).error


def test_prompts(mor_: Mor, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", run, "--max-new-tokens", 3, "--greedy", "--json"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the king"))
    piped = json.loads(mor_(*words, "--prompt", "-").out)
    assert piped["prompt"] == "the king"
    assert piped["token_ids"] == json.loads(mor_(*words, "--prompt", "the king").out)["token_ids"]
    empty = json.loads(mor_(*words).out)
    assert empty["prompt"] == ""
    model = load_model(run)
    expected = model.generate(torch.tensor([[0]]), max_new_tokens=3, do_sample=False)
    assert empty["token_ids"] == expected[0, 1:].tolist()


def test_a_prompt_too_long(mor_: Mor, run: Path) -> None:
    done = mor_("generate", run, "--prompt", "king " * 100)
    assert "max_position_embeddings=64; shorten one of them" in done.error
    done = mor_("generate", run, "--prompt", "king", "--max-new-tokens", 64)
    assert "max_new_tokens=64" in done.error


def test_a_tokenizer_of_another_model(mor_: Mor, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config))
    assert "of another shape" in mor_("generate", folder, "--prompt", "king").error
    small = load_model(run)
    small.resize_token_embeddings(20)
    small.save_pretrained(folder)
    assert "belongs to another model" in mor_("generate", folder, "--prompt", "king").error


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", -1),
        ("--temperature", 1e-9),
        ("--temperature", "inf"),
        ("--max-new-tokens", 0),
        ("--top-p", 2),
        ("--top-k", -1),
    ],
)
def test_sampling_options_that_cannot_be(mor_: Mor, option: tuple[str, Any], run: Path) -> None:
    done = mor_("generate", run, "--prompt", "king", *option)
    assert done.code == 2
    assert "Traceback" not in done.err


# The rest --------------------------------------------------------------------------------------


def test_convert_llama(mor_: Mor, run: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    llama = LlamaForCausalLM(config).eval()
    llama.save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / "model" / name, tmp_path / "llama")
    out = tmp_path / "ours"
    assert "convert it first: mor convert llama" in mor_("generate", tmp_path / "llama").error
    assert mor_("convert", "llama", tmp_path / "llama", "--out", out).code == 0
    words = ["generate", out, "--prompt", "the king", "--greedy", "--max-new-tokens", 8, "--json"]
    found = json.loads(mor_(*words, "--ignore-eos").out)
    ids = load_tokenizer(out)("the king", return_tensors="pt").input_ids
    expected = llama.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert set(found["depths"]) == {1}
    assert mor_("convert", "llama", tmp_path / "llama", "--out", out).error
    assert mor_("convert", "llama", tmp_path / "none", "--out", tmp_path / "x").error
    assert not (tmp_path / "x").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
def test_report(mor_: Mor, run: Path, data: Path, tmp_path: Path) -> None:
    scored = Path(shutil.copytree(run, tmp_path / "tiny"))
    assert mor_("eval", scored, "--data", data, "--out", scored / "eval.json").code == 0
    done = mor_("report", scored, "--out", tmp_path / "report")
    assert done.code == 0
    assert (tmp_path / "report" / "index.html").is_file()
    assert "tiny" in done.out
    assert "is not a folder" in mor_("report", tmp_path / "no", "--out", tmp_path / "r").error
    assert not (tmp_path / "r").exists()


def test_version_and_help(mor_: Mor) -> None:
    assert mor_("version").out.strip() == mor.__version__
    assert "calibrate" in mor_("--help").out
    assert mor_("nonsense").code == 2


def test_errors_of_the_network_and_the_system_are_one_line(
    mor_: Mor, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", run, "--data", data]
    for error, said in (
        (ValueError("input_ids holds token id 9\nvocab_size=5"), "token id 9 vocab_size=5"),
        (PermissionError(13, "Permission denied", "x.json"), "Permission denied: 'x.json'"),
    ):
        monkeypatch.setattr("mor.cli.evaluate.evaluate_model", raising(error))
        assert said in mor_(*words).error
    monkeypatch.setattr("mor.cli.evaluate.evaluate_model", raising(KeyboardInterrupt()))
    done = mor_(*words)
    assert done.code == 130
    assert "Traceback" not in done.err


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_(*args: Any, **kwargs: Any) -> Any:
        raise error

    return raise_


def test_debugging_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOR_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["mor", "eval", "nowhere", "--data", "x"])
    with pytest.raises(mor.MorError, match="'nowhere' does not exist"):
        main()


@pytest.mark.slow
def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mor", "eval", "nowhere", "--data", "x"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("mor.cli", run_name="__main__")
    assert done.value.code == 2
    assert capsys.readouterr().err == "error: model folder 'nowhere' does not exist\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "a/b"), "No such file: 'a/b'"),
        (RecursionError("maximum depth"), "something is nested too deeply to be read"),
        (MemoryError(), "not enough memory for these sizes: MemoryError"),
        (RuntimeError("[enforce] can't allocate memory: 9"), "not enough memory for these sizes"),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_what_is_said_about_an_error(error: Exception, said: str | None) -> None:
    found = describe(error)
    assert found is None if said is None else found is not None and found.startswith(said)


def test_a_file_where_a_folder_belongs_is_named_so(mor_: Mor, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    data = ["--data", file]
    for words in (
        ["generate", file],
        ["merge", file, "--out", tmp_path / "m"],
        ["data", "info", file],
    ):
        assert "is a file, not a folder" in mor_(*words).error
    done = mor_("convert", "gguf", tmp_path, "--out", tmp_path / "g")
    assert "is a folder, not a file" in done.error
    assert "is a file" in mor_("curves", "nothing", *data, "--out", file).error
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 3000 + "]" * 3000)
    assert "is not YAML: it is nested too deeply" in mor_("train", tmp_path / "deep.yaml").error
