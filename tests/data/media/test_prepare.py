"""`mor data prepare` of images and sounds: folders of a user's own, splits, copies, packages."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mor.cli.app import app
from mor.data.media import MediaDataset, MediaIndex, MediaOptions, prepare_media
from mor.data.media.errors import BadMedia
from mor.data.media.folders import list_folder
from mor.data.media.splits import Fractions, drop_copies, split_off
from mor.data.media.writer import Examples
from mor.errors import MorError

FRACTIONS = Fractions(0.25, 0.25, 0)


def picture(number: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    made = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(made)


def fill(folder: Path, classes: str = "ant bee", each: int = 8, start: int = 0) -> Path:
    for place, name in enumerate(classes.split()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            picture(start + 100 * place + number).save(folder / name / f"{number}.png")
    return folder


def prepare_images(folder: Path, out: Path, **options: object) -> MediaIndex:
    given: dict[str, object] = {"height": 4, "width": 6, "test_fraction": 0.25} | options
    return prepare_media("images", out, folder=folder, options=MediaOptions(**given))  # type: ignore[arg-type]


# A user's own folders --------------------------------------------------------------------------


def test_folders_are_classes(tmp_path: Path) -> None:
    index = prepare_images(fill(tmp_path / "in"), tmp_path / "out", validation_fraction=0.25)
    assert index.classes == ("ant", "bee")
    assert {name: split.examples for name, split in index.splits.items()} == {
        "train": 8,
        "validation": 4,
        "test": 4,
    }
    assert index.shape == (4, 6, 3)
    for split in index.splits:
        assert sorted(set(MediaDataset(tmp_path / "out", split).labels.tolist())) == [0, 1]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev", "VAL"])
def test_folders_that_are_splits(name: str, tmp_path: Path) -> None:
    for place, split in enumerate(("train", name, "test")):
        fill(tmp_path / "in" / split, each=2 + place, start=1000 * place)
    index = prepare_images(tmp_path / "in", tmp_path / "out")
    counts = [index.split(split).examples for split in ("train", "validation", "test")]
    assert counts == [4, 6, 8]


def test_classes_that_are_numbers_keep_their_order(tmp_path: Path) -> None:
    fill(tmp_path, "10 9 1", each=1)
    assert list_folder(tmp_path, "images").classes == ["1", "9", "10"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata(kind: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    rows = [{"file_name": f"deep/{n}.png", "animal": "bee" if n % 2 else "ant"} for n in range(6)]
    for n in range(7):
        picture(n).save(tmp_path / "deep" / f"{n}.png")
    rows.append({"file_name": "gone.png", "animal": "ant"})
    if kind == "csv":
        lines = ["\ufefffile_name,animal", *(f"{r['file_name']},{r['animal']}" for r in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (tmp_path / f"metadata.{kind}").write_text("\r\n".join(lines), "utf-8")
    listing = list_folder(tmp_path, "images", "animal")
    assert [file.label for file in listing.files] == ["ant", "bee"] * 3
    assert {one["file"]: one["reason"] for one in listing.skipped} == {
        "deep/6.png": "the metadata do not name it",
        "gone.png": "the metadata name it, and it is not there",
    }
    with pytest.raises(MorError, match=r"row 1 .* has no 'label'"):
        list_folder(tmp_path, "images")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n../x.png,a\n", "outside the folder"),
        ("file_name,label\n/etc/x.png,a\n", "outside the folder"),
        ("name,label\nx.png,a\n", "row 1 has no file_name"),
        ("file_name,label\nx.png,\n", "has no 'label'"),
        ("file_name,label\nx.png,a\nx.png,b\n", "twice"),
    ],
)
def test_wrong_metadata(text: str, message: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / "x.png")
    (tmp_path / "metadata.csv").write_text(text, "utf-8")
    with pytest.raises(MorError, match=message):
        list_folder(tmp_path, "images")


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist"):
        list_folder(tmp_path / "none", "images")
    with pytest.raises(MorError, match="no labelled images"):
        list_folder(tmp_path, "images")
    picture(0).save(tmp_path / "x.png")
    with pytest.raises(MorError, match=r"x\.png: it is in no folder of a class"):
        list_folder(tmp_path, "images")
    fill(tmp_path, "ant")
    with pytest.raises(MorError, match="one class, 'ant'"):
        list_folder(tmp_path, "images")


def test_broken_files_stop_or_are_listed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    (folder / "ant" / "cut.png").write_bytes((folder / "ant" / "0.png").read_bytes()[:60])
    (folder / "ant" / "empty.jpg").write_bytes(b"")
    (folder / "ant" / "notes.txt").write_text("hello", "utf-8")
    (folder / "bee" / "again.png").write_bytes((folder / "ant" / "1.png").read_bytes())
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    with pytest.raises(BadMedia, match=r"cut\.png: .*cut short .*--skip-bad-rows"):
        prepare_images(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    index = prepare_images(folder, tmp_path / "out", skip_bad=True)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text("utf-8").splitlines()
    reasons = {row["file"]: row["reason"] for row in map(json.loads, lines)}
    assert list(reasons) == ["ant/cut.png", "ant/empty.jpg", "ant/notes.txt", "bee/again.png"]
    assert reasons["bee/again.png"] == "exact copy of another"
    assert index.skipped == 4
    assert sum(split.examples for split in index.splits.values()) == 16  # nothing is lost


def test_the_same_again_and_another(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in")
    first = prepare_images(folder, tmp_path / "out")
    second = prepare_images(folder, tmp_path / "out")
    assert (first.reused, second.reused) == (False, True)
    assert first.splits == second.splits
    with pytest.raises(MorError, match="already holds another preparation"):
        prepare_images(folder, tmp_path / "out", seed=1)
    prepare_media(
        "images", tmp_path / "out", folder=folder, options=MediaOptions(seed=1), overwrite=True
    )
    (tmp_path / "out" / "mine.txt").write_text("keep me", "utf-8")
    with pytest.raises(MorError, match=r"holds other things \(mine\.txt\)"):
        prepare_media("images", tmp_path / "out", folder=folder, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "height=0"),
        ({"channels": 2}, "channels=2"),
        ({"fit": "stretch"}, "fit='stretch'"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(MorError, match=message):
        MediaOptions(**options)  # type: ignore[arg-type]


def test_sounds(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    draw = np.random.default_rng(0)
    for name, hertz in (("low", 200), ("high", 2000)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(5):
            rate, length = (8_000, 0.2) if number % 2 else (44_100, 0.3)
            times = np.arange(int(rate * length)) / rate
            wave = 0.3 * np.sin(2 * np.pi * hertz * times) + 0.01 * draw.normal(size=len(times))
            wave = np.stack([wave, wave], 1) if number == 4 else wave
            soundfile.write(tmp_path / "in" / name / f"{number}.wav", wave, rate)
    soundfile.write(tmp_path / "in" / "low" / "silent.wav", np.zeros(8_000), 16_000)
    soundfile.write(tmp_path / "in" / "low" / "short.wav", np.ones(50) / 2, 16_000)
    result = CliRunner().invoke(
        app,
        [
            *("data", "prepare", "audio", str(tmp_path / "in"), "--out", str(tmp_path / "out")),
            *("--skip-bad-rows", "--mels", "20", "--test-fraction", "0.2"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "frames of 20" in result.output
    assert "2 files" in result.output
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text("utf-8")
    assert "silent" in skipped
    assert "fewer than the 400" in skipped
    shapes = {tuple(item["input_features"].shape) for item in MediaDataset(tmp_path / "out")}
    assert shapes == {(18, 20), (28, 20)}  # 0.2 s and 0.3 s, a frame every 10 ms
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text("utf-8"))
    assert told["feature_extractor_type"] == "Speech2TextFeatureExtractor"
    assert CliRunner().invoke(app, ["data", "info", str(tmp_path / "out")]).exit_code == 0
    assert (
        "ok test.safetensors"
        in CliRunner().invoke(app, ["data", "verify", str(tmp_path / "out")]).output
    )


# Splits and copies -----------------------------------------------------------------------------


def test_held_out_by_class() -> None:
    labels = [0] * 10 + [1] * 3 + [2]
    every = Examples([np.array([n]) for n in range(14)], list(labels))
    out = split_off(every, 0.2, 0)
    assert out.labels == [0, 0, 1]
    assert sorted(int(v[0]) for v in out.values + every.values) == list(range(14))
    again = Examples([np.array([n]) for n in range(14)], list(labels))
    assert [int(v[0]) for v in split_off(again, 0.2, 0).values] == [int(v[0]) for v in out.values]
    assert not split_off(every, 0.0, 0).values


def test_copies_leave_the_test_split_alone() -> None:
    one, two = np.zeros((2, 2)), np.ones((2, 2))
    splits = {"train": Examples([one, two, two.copy()], [0, 1, 1]), "test": Examples([one], [0])}
    assert drop_copies(splits) == [("train", 0), ("train", 2)]
    assert splits["train"].labels == [1]
    assert len(splits["test"].values) == 1


def test_the_command_says_what_it_takes(tmp_path: Path) -> None:
    for arguments, message in [
        (["images"], "needs folder"),
        (["digits", str(tmp_path)], "takes no folder"),
        (["shakespeare", str(tmp_path)], "takes no folder"),
        (["images", str(tmp_path), "--size", "a"], "size='a'"),
    ]:
        result = CliRunner().invoke(app, ["data", "prepare", *arguments, "--out", "x"])
        assert result.exit_code == 2 or isinstance(result.exception, MorError)
        assert message in result.output + str(result.exception)


def test_pictures_of_any_size_and_kind_become_one(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", each=3)
    held = io.BytesIO()
    Image.new("CMYK", (300, 20), (0, 255, 0, 0)).save(held, "JPEG")
    (folder / "ant" / "wide.JPG").write_bytes(held.getvalue())
    index = prepare_images(folder, tmp_path / "out", channels=1, fit="squeeze")
    assert index.shape == (4, 6, 1)
    assert sum(split.examples for split in index.splits.values()) == 7
