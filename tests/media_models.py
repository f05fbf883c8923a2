"""Small models of images and text, and what goes with them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Speech2TextFeatureExtractor

from mor import MoRConfig, MoRForConditionalGeneration, MoRProcessor
from mor.data.tokenizer import train_tokenizer
from mor.hf import MoRAudioProcessor
from mor.hf.grey import MoRImageProcessor

WORDS = ["a picture of the digit seven", "a three to the left of a nine"]
PATCHES = 8  # of 4 x 4 pixels in a grey image of 8 x 16
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


@cache
def image_tokenizer() -> Any:
    """A tokenizer that knows ``<image>``."""
    tokenizer = train_tokenizer(WORDS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def image_processor() -> MoRProcessor:
    """Grey pictures of 8 x 16, and text."""
    grey = MoRImageProcessor(size={"height": 8, "width": 16}, image_mean=[0.5], image_std=[0.5])
    return MoRProcessor(grey, image_tokenizer(), num_image_tokens=PATCHES)


def image_config(router: str = "threshold", **fields: Any) -> MoRConfig:
    """Of a model of text that reads images."""
    return MoRConfig(**{
        "vocab_size": len(image_tokenizer()), "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_recursions": 3, "num_recursion_layers": 1,
        "router": router, "initializer_range": 0.25, "max_position_embeddings": 128,
        "image_token_id": image_tokenizer().convert_tokens_to_ids("<image>"),
        "image_size": [8, 16], "patch_size": 4, "num_channels": 1,
        "bos_token_id": 0, "eos_token_id": 0,
    } | fields)  # fmt: skip


@cache
def image_model(router: str = "threshold") -> MoRForConditionalGeneration:
    """Its tokens, patches among them, differ in depth."""
    torch.manual_seed(3)
    model = MoRForConditionalGeneration(image_config(router))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(20)
    model.train()
    for seed in range(3):  # boundaries
        ids = torch.full((4, 16), model.config.image_token_id)
        ids[:, PATCHES:] = torch.randint(1, 200, (4, 8))
        pixels = torch.stack([pixels_of(10 * seed + i) for i in range(4)])
        model(ids, pixels, labels=ids)
        model.model.router.finish_step()
    return model.eval().to(torch.float64)


def picture(seed: int) -> Image.Image:
    """Grey, 16 wide and 8 high."""
    values = np.random.default_rng(seed).integers(0, 256, (8, 16), dtype=np.uint8)
    return Image.fromarray(values)


def pixels_of(seed: int) -> torch.Tensor:
    """[1, 8, 16] of :func:`picture`, as the model takes them."""
    return torch.from_numpy(np.asarray(picture(seed)) / 255.0 * 2 - 1).float()[None]


BINS, STRIDE = 16, [2, 2]


@cache
def sound_tokenizer() -> Any:
    """A tokenizer that knows ``<audio>``."""
    tokenizer = train_tokenizer(WORDS, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<audio>"]})
    tokenizer.chat_template = TEMPLATE.replace("image", "audio")
    return tokenizer


def sound_processor() -> MoRAudioProcessor:
    """Sounds of 16 kHz, and text."""
    hear = Speech2TextFeatureExtractor(feature_size=BINS, num_mel_bins=BINS)
    return MoRAudioProcessor(hear, sound_tokenizer(), conv_stride=STRIDE)


@cache
def sound_model() -> MoRForConditionalGeneration:
    """A model of text that hears sounds; its tokens, frames among them, differ in depth."""
    torch.manual_seed(4)
    named = sound_tokenizer().convert_tokens_to_ids("<audio>")
    fields = {"image_token_id": None, "image_size": None, "patch_size": None}
    fields |= {"audio_token_id": named, "num_mel_bins": BINS, "conv_stride": STRIDE}
    model = MoRForConditionalGeneration(image_config(**fields | {"conv_kernel": [3, 3]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.mul_(20)
    return model.eval().to(torch.float64)


def tone(length: int, pitch: float = 0.2) -> np.ndarray:
    """Samples of a sound that changes as it goes on, float32 in -1..1."""
    places = np.arange(length, dtype=np.float32)
    return np.sin(places * pitch * (1 + places / length)) * 0.5
