"""Pictures of depth over images and sounds, out of what an evaluation kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mor.config import MoRConfig
from mor.data.media import MediaDataset
from mor.errors import MorError
from mor.eval.shown import show_examples
from mor.report import build_report, load_runs
from mor.report.depth_maps import image_depth, sound_depth
from mor.report.records import load_run
from mor.report.style import LIGHT, styled
from tests.media import make_folder

MakeRun = Callable[..., Path]


def is_drawn(png: bytes) -> bool:
    """Whether this is a whole PNG with the colours of depth on it; a single row is not high."""
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.format == "PNG" and len(image.getcolors() or "x" * 9) > 8


def shown(kind: str, count: int) -> list[dict[str, Any]]:
    """Examples of random values and depths."""
    draw = np.random.default_rng(0)
    shape = [8, 8, 1] if kind == "images" else [21, 5]
    rows, columns = (4, 4) if kind == "images" else (1, 11)
    return [
        {
            "place": number,
            "truth": "yes",
            "answer": "no" if number == count - 1 else "yes",
            "nll": number / 10,
            "mean_depth": 2.0,
            "depths": draw.integers(1, 4, (rows, columns)).tolist(),
            "frames_per_token": 1 if kind == "images" else 2,
            "shape": shape,
            "values": base64.b64encode(
                draw.integers(0, 256, shape, dtype=np.uint8).tobytes()
            ).decode(),
        }
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("kind", "draw", "other"),
    [("images", image_depth, sound_depth), ("audio", sound_depth, image_depth)],
)
def test_a_picture_of_depth(
    kind: str, draw: Callable[..., bytes], other: Callable[..., bytes], make_run: MakeRun
) -> None:
    dense = load_run(make_run("dense", num_recursions=1, router="none", family="vanilla"))
    run = load_run(make_run("routed", evaluation={"kind": kind, "shown": shown(kind, 5)}))
    with styled(LIGHT):
        assert is_drawn(draw([dense, run], LIGHT))
        assert other([dense, run], LIGHT) is None
        assert draw([dense], LIGHT) is None
        one = load_run(make_run("one", evaluation={"kind": kind, "shown": shown(kind, 1)}))
        assert is_drawn(draw([one], LIGHT))


def test_the_page_holds_it(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("routed", evaluation={"kind": "images", "shown": shown("images", 3)})
    page = build_report([folder], tmp_path / "report")
    assert "Which patches go deep" in page.read_text("utf-8")
    assert (tmp_path / "report" / "image_depth.png").is_file()
    assert "values" not in (tmp_path / "report" / "results.jsonl").read_text("utf-8")


@pytest.mark.parametrize(
    "wrong", [{"values": "AAAA"}, {"depths": []}, {"depths": [[1], [1, 2]]}, {"values": "%"}]
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], make_run: MakeRun) -> None:
    held = [shown("images", 1)[0] | wrong]
    folder = make_run("routed", evaluation={"kind": "images", "shown": held})
    with pytest.raises(MorError, match="shown"):
        load_runs([folder])


@pytest.mark.parametrize("kind", ["images", "audio"])
def test_examples_go_from_easy_to_hard(kind: str, tmp_path: Path) -> None:
    dataset = MediaDataset(make_folder(tmp_path / kind, kind), "test")
    config = MoRConfig(
        modality="image" if kind == "images" else "audio",
        num_labels=3,
        **({"image_size": 8, "patch_size": [2, 4], "num_channels": 1} if kind == "images" else {}),
        **({} if kind == "images" else {"num_mel_bins": 3}),
    )
    nlls = torch.linspace(1, 0, len(dataset))
    tokens = [
        8 if kind == "images" else config.tokens_of_frames(len(dataset.raw(place)))
        for place in range(len(dataset))
    ]
    depths = [torch.arange(count) % 3 + 1 for count in tokens]
    made = show_examples(config, dataset, nlls, dataset.labels, depths, 5)
    places = [one["place"] for one in made]
    assert places[0] == len(dataset) - 1
    assert places[-1] == 0
    assert sorted(places, reverse=True) == places
    first = made[0]
    assert first["truth"] == first["answer"]
    assert len(base64.b64decode(first["values"])) == np.prod(first["shape"])
    if kind == "images":
        assert first["depths"] == [[1, 2], [3, 1], [2, 3], [1, 2]]  # rows of patches
        raw = np.frombuffer(base64.b64decode(first["values"]), np.uint8).reshape(first["shape"])
        assert np.array_equal(raw, dataset.raw(places[0]).numpy())
    else:
        assert len(first["depths"][0]) == tokens[places[0]]
        assert max(base64.b64decode(first["values"])) == 255
