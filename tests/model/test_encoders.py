"""Networks over patches and frames, in both directions, held equal to the plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mor import MoRConfig
from mor.hf.register import class_for
from mor.model.cache import DepthCache
from mor.model.ends import pool
from tests.reference import reference
from tests.strategies import KV_SHARING

FRAMES = [13, 4, 1, 9]


def make(modality: str, router: str, kv_sharing: str = "none", **fields: Any) -> Any:
    """A model in float64 whose tokens differ in depth."""
    own: dict[str, Any] = {"image_size": [12, 8], "patch_size": 4, "num_channels": 1}
    if modality == "audio":
        own = {"num_mel_bins": 5, "conv_kernel": [3, 4], "conv_stride": [1, 2]}
    config = MoRConfig(
        modality=modality,
        num_labels=3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_recursions=3,
        num_recursion_layers=1,
        initializer_range=0.3,
        router=router,
        kv_sharing=kv_sharing,
        **own | fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = class_for(config)(config).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".router." in name:
                    parameter.normal_(0.0, 0.5)
                elif "norm" in name:
                    parameter.normal_(1.0, 0.2)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
        model.train()
        for _ in range(3):
            model.model(features=batch_of(modality)[0])
            model.model.router.finish_step()
    return model.eval()


def batch_of(modality: str) -> tuple[Tensor, Tensor | None]:
    """Four inputs; of sounds, one with padding on its left and one with a hole."""
    draw = torch.Generator().manual_seed(1)
    if modality == "image":
        return torch.randn(4, 1, 12, 8, generator=draw, dtype=torch.float64), None
    frames = torch.randn(4, 13, 5, generator=draw, dtype=torch.float64)
    mask = torch.arange(13) < torch.tensor(FRAMES)[:, None]
    mask[1], mask[3, 5] = mask[1].flip(0), False
    mask[3, 9] = True
    return frames, mask.long()


@pytest.mark.parametrize(
    ("modality", "router", "kv_sharing"),
    [  # images and sounds by turns, so that every router and every mode meets both
        (("image", "audio")[(i + j) % 2], router, kv_sharing)
        for i, router in enumerate(("fixed", "expert_choice", "threshold", "token_choice"))
        for j, kv_sharing in enumerate(KV_SHARING)
    ],
)
def test_a_mixed_batch_is_what_the_reference_says(
    modality: str, router: str, kv_sharing: str
) -> None:
    model = make(modality, router, kv_sharing)
    features, mask = batch_of(modality)
    alone = [
        one[None] if mask is None else one[None, keep.bool()]
        for one, keep in zip(features, features if mask is None else mask, strict=True)
    ]
    for rule in ("causal", "topk"):
        if rule == "topk" and not model.model.router.selects_in_rows:
            continue
        output = model.model(features=features, attention_mask=mask, routing=rule)
        found = model.model.head(output.hidden, output.real)
        rows = [model.model.embed(one)[0] for one in alone]
        wanted = reference(model, rows, causal=rule == "causal")
        assert_close(found, torch.stack(wanted.logits))
        for depths, theirs in zip(output.depths, wanted.depths, strict=True):
            assert depths[: len(theirs)].tolist() == theirs.tolist()
            assert not depths[len(theirs) :].any()
        direction = torch.randn_like(found)
        weights = [p for n, p in model.named_parameters() if ".router." not in n]
        ours = torch.autograd.grad(found, weights, direction, allow_unused=True)
        plain = torch.autograd.grad(torch.stack(wanted.logits), weights, direction)
        for one, two in zip(ours, plain, strict=True):
            assert_close(one, two)


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_an_input_alone_is_what_it_is_in_a_batch(modality: str) -> None:
    model = make(modality, "expert_choice")
    features, mask = batch_of(modality)
    whole = model.model(features=features, attention_mask=mask)
    logits = model.model.head(whole.hidden, whole.real)
    for place, one in enumerate(features):
        keep = slice(None) if mask is None else mask[place].bool()
        single = model.model(features=one[None, keep] if mask is not None else one[None])
        assert_close(model.model.head(single.hidden, single.real)[0], logits[place])


def test_encoders_follow_top_k_by_themselves_and_others_their_boundary() -> None:
    features, mask = batch_of("audio")
    for router, rule in (("expert_choice", "topk"), ("threshold", "causal")):
        model = make("audio", router)
        own = model.model(features=features, attention_mask=mask)
        asked = model.model(features=features, attention_mask=mask, routing=rule)
        assert torch.equal(own.hidden, asked.hidden)
    causal = make("audio", "expert_choice", is_causal=True)
    own = causal.model(features=features, attention_mask=mask)
    asked = causal.model(features=features, attention_mask=mask, routing="causal")
    assert torch.equal(own.hidden, asked.hidden)


@pytest.mark.parametrize("is_causal", [True, False])
def test_only_encoders_look_ahead(is_causal: bool) -> None:
    """Token t of the audio model has seen frames up to 2 t."""
    model = make("audio", "threshold", is_causal=is_causal)
    frames = batch_of("audio")[0][:1]
    before = model.model(features=frames).hidden
    changed = frames.clone()
    changed[:, 9:] += 1
    after = model.model(features=changed).hidden
    assert torch.equal(before[:, :5], after[:, :5]) is is_causal
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_nothing_is_cached_that_later_tokens_change() -> None:
    model = make("image", "fixed")
    with pytest.raises(ValueError, match="is_causal=False"):
        model.model(features=batch_of("image")[0], cache=DepthCache(model.config))


def test_patches_are_a_strided_convolution_with_places() -> None:
    model = make("image", "fixed")
    front, pixels = model.model.embed_tokens, batch_of("image")[0]
    weight = front.projection.weight.view(16, 1, 4, 4)
    wanted = torch.nn.functional.conv2d(pixels, weight, front.projection.bias, stride=4)
    found = model.model.embed(pixels).view(4, 3, 2, 16)
    for row in range(3):
        for column in range(2):
            place = front.row_embedding.weight[row] + front.column_embedding.weight[column]
            assert_close(found[:, row, column], wanted[:, :, row, column] + place)


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 9])
def test_a_convolution_keeps_a_place_for_every_stride(frames: int) -> None:
    model = make("audio", "fixed")
    values = batch_of("audio")[0][:, :frames]
    assert model.model.embed(values).shape[1] == model.config.tokens_of_frames(frames)


def test_pooling_takes_real_tokens_alone() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    assert_close(
        pool(hidden, real, "mean"), torch.stack((hidden[0, :2].mean(0), hidden[1].mean(0)))
    )
    assert_close(pool(hidden, real, "last"), torch.stack((hidden[0, 1], hidden[1, 3])))
    assert_close(pool(hidden, None, "last"), hidden[:, -1])
    many = torch.full((1, 3001, 1), 30.0, dtype=torch.float16)  # their sum is beyond all of these
    assert_close(pool(many, torch.arange(3001)[None] > 0, "mean"), many[:, 0])


@pytest.mark.parametrize(
    ("modality", "features", "mask", "why"),
    [
        ("image", torch.zeros(2, 3, 12, 8), None, r"takes \[B, 1, 12, 8\]"),
        ("image", torch.zeros(1, 12, 8), None, "num_channels"),
        ("image", torch.zeros(0, 1, 8, 12), None, "num_channels"),
        ("image", torch.zeros(2, 1, 12, 8), torch.ones(2, 6), "all patches are real"),
        ("audio", torch.zeros(2, 4, 7), None, r"\[B, frames, 5\]"),
        ("audio", torch.zeros(2, 0, 5), None, "at least one frame"),
        ("audio", torch.zeros(4, 5), None, r"\[B, frames, 5\]"),
        ("audio", torch.zeros(2, 4, 5), torch.ones(2, 3), r"must be \[2, 4\]"),
        ("audio", torch.zeros(2, 4, 5), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "row 1"),
    ],
)
def test_wrong_inputs_are_refused(
    modality: str, features: Tensor, mask: Tensor | None, why: str
) -> None:
    model = make(modality, "fixed")
    with pytest.raises(ValueError, match=why):
        model.model(features=features, attention_mask=mask)
    with pytest.raises(ValueError, match="input_ids are for models of text"):
        model.model(torch.zeros(1, 3, dtype=torch.long))
