"""What a run reads: mixtures, packings, resuming at the exact sample, checked shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mor.data import PackedDataset, TrainingSamples, prepare
from mor.errors import MorError
from mor.train import Recipe, parse_recipe, train
from mor.train.data import describe_passes, open_run_data
from tests.tiny import tiny_fields, write_corpus


@pytest.fixture(scope="module")
def second(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller folder with the tokenizer of the first."""
    root = tmp_path_factory.mktemp("second")
    corpus = write_corpus(root / "corpus", documents=6, words=30)
    prepare(corpus, root / "data", tokenizer=data / "tokenizer", validation_fraction=0.3)
    return root / "data"


def recipe_of(output: Path, folder: Path | list[tuple[Path, float]], **changes: Any) -> Recipe:
    fields = tiny_fields(Path("unset"), output, "threshold")
    del fields["data"]["path"]
    if isinstance(folder, Path):
        fields["data"]["path"] = str(folder)
    else:
        fields["data"]["mixture"] = [{"path": str(p), "weight": w} for p, w in folder]
    for name, value in changes.items():
        fields["data" if name in ("packing", "verify", "document_mask") else "train"][name] = value
    return parse_recipe(fields)


def result(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Weights and losses of a finished run."""
    tensors = load_file(folder / "model" / "model.safetensors")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    losses = [{k: e.get(k) for k in ("step", "loss", "epoch", "eval_loss")} for e in lines]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}, losses


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_resumed_run_reads_what_is_left_and_ends_the_same(
    data: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packing: str,
    mixed: bool,
) -> None:
    folder: Any = [(data, 2.0), (second, 1.0)] if mixed else data
    changes: dict[str, Any] = {
        "packing": packing,
        "save_steps": 5,
        "gradient_accumulation_steps": 3,
    }
    changes |= {"budget": {"steps": 12}, "num_workers": 0, "save_total_limit": 9}
    recipe = recipe_of(tmp_path, folder, **changes)
    run = train(recipe)
    want = result(run)
    # The middle of a later epoch of the (smaller) folder.
    assert want[1][4]["epoch"] > (0.3 if mixed else 1)
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    for step in (10, 12):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{step}", ignore_errors=True)
    read: list[int] = []
    locate = TrainingSamples.locate

    def note(self: TrainingSamples, sample: int) -> tuple[PackedDataset, int]:
        if self.per_step > 1:
            read.append(sample)
        return locate(self, sample)

    monkeypatch.setattr(TrainingSamples, "locate", note)
    train(recipe, resume=True)
    assert result(run) == want
    per_step = 2 * 3
    assert read == list(range(5 * per_step, 12 * per_step))


def test_worker_processes_change_nothing(data: Path, tmp_path: Path) -> None:
    alone = train(recipe_of(tmp_path / "alone", data))
    helped = train(recipe_of(tmp_path / "helped", data, num_workers=2))
    assert result(helped) == result(alone)


def test_validation_of_a_mixture_holds_no_row_twice(
    data: Path, second: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, [(data, 1.0), (second, 5.0)], eval_sequences=50)
    opened = open_run_data(recipe, 4)
    rows = [opened.validation[i]["input_ids"].tolist() for i in range(len(opened.validation))]  # type: ignore[arg-type]
    assert 2 <= len(rows) < 50
    assert len({str(row) for row in rows}) == len(rows)
    assert len(describe_passes(recipe.data, 1000).split(", ")) == 2


def test_validation_in_training_is_spread_over_the_split(data: Path, tmp_path: Path) -> None:
    """Its first rows alone would be one source of several."""
    recipe = recipe_of(tmp_path, data, eval_sequences=3)
    split = PackedDataset(data, "validation", recipe.data.seq_len)
    want = [split[number * len(split) // 3]["input_ids"].tolist() for number in range(3)]
    assert len(split) >= 5
    held = open_run_data(recipe, 4).validation
    assert [held[number]["input_ids"].tolist() for number in range(3)] == want


def test_folders_of_another_tokenizer_are_refused(data: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    prepare(corpus, tmp_path / "strange", vocab_size=280, validation_fraction=0.3)
    with pytest.raises(MorError, match="was prepared with another tokenizer than"):
        train(recipe_of(tmp_path, [(data, 1.0), (tmp_path / "strange", 1.0)]))
    assert not (tmp_path / "tiny").exists()


def test_damage_is_found_before_training_if_asked_for(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    shard = folder / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[66] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MorError, match=r"train-00000\.bin is damaged: its SHA-256 .*; copy it"):
        train(recipe_of(tmp_path, folder, verify=True))
    assert not (tmp_path / "tiny").exists()
    train(recipe_of(tmp_path, folder))
    shard.write_bytes(bytes(content[:-3]))  # this is seen without being asked for
    with pytest.raises(MorError, match=r"train-00000\.bin is cut short: .*; copy it anew from"):
        train(recipe_of(tmp_path, folder), overwrite=True)


def test_moved_folders_may_be_resumed(data: Path, second: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(second, tmp_path / "copy")
    folders = [(data, 2.0), (second, 1.0)]
    changes: dict[str, Any] = {"save_steps": 4, "budget": {"steps": 8}}
    run = train(recipe_of(tmp_path, folders, **changes))
    want = result(run)
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    with pytest.raises(MorError, match=r"recipe: data\.mixture=\[2\.0, 3\.0\] was \[2\.0, 1"):
        train(recipe_of(tmp_path, [(data, 2.0), (copy, 3.0)], **changes), resume=True)
    train(recipe_of(tmp_path, [(data, 2.0), (copy, 1.0)], **changes), resume=True)
    assert result(run) == want
