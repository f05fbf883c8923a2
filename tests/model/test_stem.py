"""Convolutions before the map of patches: what they give, what they cost, what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from mor import ConfigError, MoRConfig, MoRForConditionalGeneration
from mor.hf.register import class_for
from mor.model.flops import count_parameters, flops_per_token
from mor.model.front import PatchEmbedding
from tests.media_models import image_config, image_model, pixels_of

STEM: dict[str, Any] = {"stem_channels": [6, 10, 8], "stem_strides": [2, 1, 2]}


def config(**fields: Any) -> MoRConfig:
    return MoRConfig(**{
        "modality": "image", "image_size": [12, 8], "patch_size": 4, "num_channels": 2,
        "num_labels": 3, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
        "num_recursions": 3, "num_recursion_layers": 1, "initializer_range": 0.3,
        "router": "expert_choice",
    } | STEM | fields)  # fmt: skip


def make(**fields: Any) -> Any:
    torch.manual_seed(2)
    found = config(**fields)
    model = class_for(found)(found)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "stem" in name and parameter.dim() == 1:
                parameter.normal_(0.5, 0.5)
        model.train()
        model.model.embed_tokens(torch.randn(5, 2, *found.image_shape))  # means and variances
    return model.eval()


@pytest.mark.parametrize(
    ("image", "patch", "channels", "strides"),
    [
        ([12, 8], 4, [6, 10, 8], [2, 1, 2]),
        ([9, 15], 3, [4], [3]),  # odd sizes
        ([7, 5], 1, [4, 4], [1, 1]),
        (12, [6, 6], [5, 3], [3, 2]),
    ],
)
def test_a_stem_is_convolutions_norms_and_a_map(
    image: Any, patch: Any, channels: list[int], strides: list[int]
) -> None:
    fields = {"image_size": image, "patch_size": patch}
    model = make(**fields, stem_channels=channels, stem_strides=strides)
    front, (height, width) = model.model.embed_tokens, model.config.image_shape
    pixels = torch.randn(2, 2, height, width)
    hidden = pixels
    for layer, stride in zip(front.stem, strides, strict=True):
        hidden = F.conv2d(hidden, layer.convolution.weight, None, stride, 1)
        norm = layer.norm
        assert norm.running_mean.any()
        hidden = (hidden - norm.running_mean[:, None, None]).div(
            (norm.running_var[:, None, None] + 1e-5).sqrt()
        )
        hidden = F.gelu(hidden * norm.weight[:, None, None] + norm.bias[:, None, None])
    rows, columns = model.config.patch_grid
    assert hidden.shape == (2, channels[-1], rows, columns)
    found = front(pixels).view(2, rows, columns, 16)
    for row in range(rows):
        for column in range(columns):
            place = front.row_embedding.weight[row] + front.column_embedding.weight[column]
            wanted = front.projection(hidden[:, :, row, column]) + place
            assert_close(found[:, row, column], wanted)
    assert model(pixels).logits.shape == (2, 3)


def test_an_image_alone_is_what_it_is_in_a_batch() -> None:
    model = make().double()
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(4, 2, 12, 8, dtype=torch.float64, generator=draw)
    front = model.model.embed_tokens
    assert_close(front(pixels), torch.cat([front(one[None]) for one in pixels]))
    assert_close(model(pixels).logits, torch.cat([model(one[None]).logits for one in pixels]))


def test_all_weights_of_a_stem_learn() -> None:
    model = make().train()
    labels = torch.tensor([0, 2])
    model(torch.randn(2, 2, 12, 8), labels=labels).loss.backward()
    stem = list(model.model.embed_tokens.stem.parameters())
    assert len(stem) == 9
    assert all(one.grad is not None and one.grad.any() for one in stem)


def test_a_stem_is_counted() -> None:
    model = make()
    front, pixels = model.model.embed_tokens, torch.randn(1, 2, 12, 8)
    with FlopCounterMode(display=False) as counter:
        front(pixels)
    assert counter.get_total_flops() == flops_per_token(model.config, 6).embed * 6
    off = config(stem_channels=None, stem_strides=None)
    plain: Any = class_for(off)(off)
    more = 9 * (2 * 6 + 6 * 10 + 10 * 8) + 2 * (6 + 10 + 8) + 16 * (8 - 4 * 4 * 2)
    assert count_parameters(model.config)[0] - count_parameters(off)[0] == more
    assert model.num_parameters() - plain.num_parameters() == more
    assert isinstance(plain.model.embed_tokens, PatchEmbedding)
    assert not [name for name in plain.state_dict() if "stem" in name]


def test_a_stem_is_saved_and_loaded(tmp_path: Path) -> None:
    model, pixels = make(), torch.randn(3, 2, 12, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    assert loaded.config.stem_layers == [(6, 2), (10, 1), (8, 2)]
    assert loaded.model.embed_tokens.stem[0].norm.running_mean.any()
    # What the file lacks begins as ever: ones and zeros in norms.
    plain = config(stem_channels=None, stem_strides=None)
    off: Any = class_for(plain)(plain)
    off.save_pretrained(tmp_path / "off")
    fresh: Any = type(off).from_pretrained(
        tmp_path / "off", config=config(), ignore_mismatched_sizes=True
    )
    for layer in fresh.model.embed_tokens.stem:
        assert bool((layer.norm.weight == 1).all())
        assert not layer.norm.bias.any()
        assert not layer.norm.running_mean.any()
        assert bool((layer.norm.running_var == 1).all())
        assert 0.2 < float(layer.convolution.weight.detach().std()) < 0.4


def test_a_language_model_reads_pictures_through_a_stem() -> None:
    plain = image_model("threshold")
    stem = {"stem_channels": [5, 6], "stem_strides": [2, 2]}
    model = MoRForConditionalGeneration(image_config(**stem)).double().eval()
    found = model.load_state_dict(plain.state_dict() | {
        name: weight for name, weight in model.state_dict().items() if ".patches." in name
    })  # fmt: skip
    assert not found.missing_keys
    ids = torch.full((2, 11), model.config.image_token_id)
    ids[:, 8:] = torch.tensor([5, 6, 7])
    pixels = torch.stack([pixels_of(1), pixels_of(2)]).double()
    both = model(ids, pixels).logits
    for place in range(2):
        assert_close(model(ids[:1], pixels[place][None]).logits[0], both[place])
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"stem_strides": None}, "stem_strides=None must be a list"),
        ({"stem_channels": None}, "stem_channels=None must be a list"),
        ({"stem_channels": 8}, "stem_channels=8"),
        ({"stem_channels": []}, r"stem_channels=\[\]"),
        ({"stem_channels": [6, 0, 8]}, "at least 1, one for each"),
        ({"stem_channels": [6, True, 8]}, "whole numbers"),
        ({"stem_strides": [4]}, "at most 3"),
        ({"stem_channels": [6, 8]}, "as many entries"),
        ({"stem_strides": [2, 1, 1]}, "make patches of 2 x 2 pixels; patch_size=4"),
        ({"patch_size": [4, 2], "image_size": 8}, r"patch_size=\[4, 2\] must be the same"),
        ({"is_causal": True}, "shows a patch its later neighbours"),
        ({"head_type": "regression"}, "is_causal=True forbids"),
    ],
)
def test_wrong_stems_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(**fields)


@pytest.mark.parametrize("shape", [(1, 1, 12, 8), (1, 2, 8, 12), (2, 12, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \[B, 2, 12, 8\]"):
        make()(torch.zeros(shape))
