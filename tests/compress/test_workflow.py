"""``mor compress`` from a source to a model with its report; stopped, it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mor.cli.app import app
from mor.compress import Compression, Goal, Settings, workflow
from mor.config import MoRConfig
from mor.data import DataIndex, PackedDataset
from mor.data import load_tokenizer as load_data_tokenizer
from mor.errors import Interrupted, MorError
from mor.folder.tokenizer import load_tokenizer
from mor.folder.weights import ConversionError
from mor.hf.bos import save_tokenizer
from mor.hf.convert import hub
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters, flops_per_token
from tests.tiny import SEQ_LEN, prepare_tiny

LAYERS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("compress"))


@pytest.fixture(scope="module")
def source(data: Path) -> Path:
    """A vanilla model that was never trained, with the data's tokenizer."""
    index = DataIndex.load(data)
    torch.manual_seed(0)
    model = MoRForCausalLM(
        MoRConfig(
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_recursions=1,
            num_prelude_layers=1,
            num_recursion_layers=LAYERS - 2,
            num_coda_layers=1,
            vocab_size=index.vocab_size,
            eos_token_id=index.eos_token_id,
            bos_token_id=None,
            max_position_embeddings=64,
        )
    )
    folder = data.parent / "source"
    model.save_pretrained(folder)
    save_tokenizer(load_data_tokenizer(index.tokenizer_dir), model.config, folder)
    return folder


@pytest.fixture
def settings(source: Path, data: Path, tmp_path: Path) -> Settings:
    return Settings(
        source=str(source),
        out=tmp_path / "small",
        goal=Goal(ratio=0.75),
        data=str(data),
        tokens=20 * 2 * SEQ_LEN,
        seq_len=SEQ_LEN,
        batch_size=2,
        sample_tokens=3 * SEQ_LEN,
    )


def test_stopped_and_gone_on_with(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    real, stops = workflow.train, iter([False, True])

    def train(recipe: Any, **options: Any) -> Path:
        if next(stops, False):
            raise Interrupted("stopped")
        return real(recipe, **options)

    monkeypatch.setattr(workflow, "train", train)
    with pytest.raises(Interrupted):
        Compression(settings, told.append).run()
    done = json.loads((settings.out / "compress.json").read_text())["done"]
    assert list(done) == ["source", "data", "estimate", "left out"]
    assert any(line.startswith("estimate: at most") for line in told)

    monkeypatch.setattr(workflow, "fold_table", guard := Counted(workflow.fold_table))
    folder = Compression(settings, told.append).run()
    assert guard.calls == 1, "the gap of the shape that was done is not looked for again"
    record = json.loads((settings.out / "compress.json").read_text())["done"]["record"]
    scores = record["scores"]
    model = load_model(folder)
    whole = count_parameters(load_model(settings.source).config)[0]
    assert count_parameters(model.config)[0] == scores["result"]["weights"] <= 0.75 * whole
    assert load_tokenizer(folder) is not None
    sizes = {"source": load_model(settings.source).config, "result": model.config}
    for whose, config in sizes.items():
        assert scores[whose]["flops"] == flops_per_token(config, SEQ_LEN).forward
    text = (folder / "README.md").read_text()
    assert text == (settings.out / "report.md").read_text()
    assert f"{scores['result']['nll']:.4f}" in text
    assert "What it is and what was lost" in text
    assert {trial["name"] for trial in record["trials"]} == {"left out", "recursive"}
    assert record["chosen"] == min(record["trials"], key=lambda trial: trial["trial_nll"])["name"]

    # The same call again trains nothing; other settings are another compression.
    monkeypatch.setattr(workflow, "train", None)
    assert Compression(settings).run() == folder
    with pytest.raises(MorError, match=r"begun with ratio=0.75, not 0.8; repeat the same command"):
        Compression(replace(settings, goal=Goal(ratio=0.8))).run()


class Counted:
    def __init__(self, do: Any) -> None:
        self.do, self.calls = do, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.do(*args, **kwargs)


def test_routed_and_by_command(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    splits, real = [], workflow.calibrate

    def calibrate(model: Any, dataset: PackedDataset, **options: Any) -> Any:
        splits.append(dataset.split)
        return real(model, dataset, **options)

    monkeypatch.setattr(workflow, "calibrate", calibrate)
    arguments = [
        settings.source, "--out", str(settings.out), "--speed", "1.3", "--data", settings.data,
        "--tokens", str(settings.tokens), "--seq-len", str(SEQ_LEN), "--batch-size", "2",
        "--sample-tokens", str(settings.sample_tokens), "--route",
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["compress", *arguments])
    assert result.exit_code == 0, result.output
    model = load_model(settings.out)
    assert (model.config.router, model.config.num_recursions) == ("threshold", 2)
    assert "compressed:" in result.output
    assert "layers before the gap run twice" in result.output
    assert splits == ["train"]  # the result is scored on the other one
    assert torch.isfinite(model.model.router.boundary[1:]).all()
    done = json.loads((settings.out / "compress.json").read_text())["done"]
    score = done["record"]["scores"]["result"]
    flops = flops_per_token(model.config, SEQ_LEN, score["active_fraction"])
    assert score["flops"] == flops.forward


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": 100.0}, "tokens=100 must be at least 640"),
        ({"goal": Goal()}, "give --ratio"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0 must be above 0"),
        ({"source": "./no/such"}, "'./no/such' does not exist"),
    ],
)
def test_bad_settings(settings: Settings, change: dict[str, Any], said: str) -> None:
    with pytest.raises(MorError, match=said):
        Compression(replace(settings, **change)).run()


def test_a_folder_with_something_else_in_it(settings: Settings) -> None:
    settings.out.mkdir()
    (settings.out / "mine.txt").write_text("mine")
    with pytest.raises(MorError, match="nothing is overwritten"):
        Compression(settings).run()
    assert (settings.out / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "named"),
    [("owner/name", True), ("gpt2", True), ("a/b/c", False), ("./a", False), ("..", False)],
)
def test_names_on_the_hub(text: str, named: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.looks_like_name(text) == named
    if named:
        (tmp_path / text).mkdir(parents=True)
        assert not hub.looks_like_name(text), "a folder that is there is meant"


def test_the_hub_is_asked_and_its_refusal_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.fetch_checkpoint("owner/name") == tmp_path
    (tmp_path / "model.safetensors").touch()
    hub.fetch_checkpoint("owner/name")
    # Pickles only where there are no safetensors.
    assert asked == [("owner/name", False), ("owner/name", True), ("owner/name", False)]

    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise hub.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ConversionError, match="'owner/name' is neither a folder here nor a model"):
        hub.fetch_checkpoint("owner/name")
