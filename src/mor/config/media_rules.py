"""Which front ends and heads make sense, and what goes with attention in both directions."""

from __future__ import annotations

import math
from typing import Any

from mor.checks import check_choice, check_flag, check_whole
from mor.config.choices import HeadType, Modality, Pooling
from mor.config.fields import Fields
from mor.errors import ConfigError


def check_media(config: Fields) -> None:
    """Validate the fields of front end and head.

    Raises:
        ConfigError: naming the first wrong field.
    """
    check_choice("modality", config.modality, Modality, error=ConfigError)
    check_choice("head_type", config.head_type, HeadType, error=ConfigError)
    check_choice("classifier_pooling", config.classifier_pooling, Pooling, error=ConfigError)
    check_flag("is_causal", config.is_causal, error=ConfigError)
    _check_head(config)
    if config.image_token_id is not None:
        _check_token(config, "image_token_id", "read images")
        _check_patches(config)
    if config.audio_token_id is not None:
        _check_token(config, "audio_token_id", "hear sounds")
        _check_audio(config)
    if config.modality == "image":
        _check_image(config)
    elif config.modality == "audio":
        _check_audio(config)


def _check_stem(config: Fields) -> None:
    """Of convolutions before patches."""
    channels, strides = config.stem_channels, config.stem_strides
    if channels is None and strides is None:
        return
    for name, sizes, most in (("stem_channels", channels, None), ("stem_strides", strides, 3)):
        if (
            not isinstance(sizes, (list, tuple))
            or not sizes
            or any(type(one) is not int or one < 1 or one > (most or one) for one in sizes)
        ):
            raise ConfigError(
                f"{name}={sizes!r} must be a list of whole numbers of at least 1"
                f"{f' and at most {most}' if most else ''}, one for each convolution of the stem"
            )
    assert channels is not None
    assert strides is not None
    if len(channels) != len(strides):
        raise ConfigError(
            f"stem_strides={strides} must have as many entries as stem_channels={channels}"
        )
    if config.patch_shape != (math.prod(strides),) * 2:
        raise ConfigError(
            f"stem_strides={strides} make patches of {math.prod(strides)} x {math.prod(strides)} "
            f"pixels; patch_size={config.patch_size} must be the same"
        )
    if config.modality == "image" and config.is_causal:
        raise ConfigError(
            f"stem_channels={channels} shows a patch its later neighbours, which is_causal=True "
            "forbids; leave it out, or use is_causal=False with head_type='classes'"
        )


def _check_head(config: Fields) -> None:
    vocabulary, text = config.head_type == "vocabulary", config.modality == "text"
    if vocabulary != text:
        right = "'vocabulary'" if text else "'classes' or 'regression'"
        raise ConfigError(
            f"head_type={config.head_type!r} does not go with modality={config.modality!r}; "
            f"use {right}"
        )
    if config.is_causal:
        return
    if config.head_type != "classes":
        raise ConfigError(
            f"is_causal=False shows a token what head_type={config.head_type!r} asks it to "
            "predict; use True, or head_type='classes' with images or sounds"
        )


def _check_token(config: Fields, name: str, what: str) -> None:
    """Of what stands for images or sounds among the tokens of a text."""
    value = getattr(config, name)
    if config.modality != "text":
        raise ConfigError(
            f"{name}={value} is for models of text that {what}; leave it out where "
            f"modality={config.modality!r}"
        )
    check_whole(name, value, 0, config.vocab_size - 1, error=ConfigError)
    if config.image_token_id is not None and config.audio_token_id is not None:
        raise ConfigError(
            f"image_token_id={config.image_token_id} and audio_token_id={config.audio_token_id} "
            "exclude each other; a model of text reads images or hears sounds"
        )


def _check_patches(config: Fields) -> None:
    check_whole("num_channels", config.num_channels, 1, error=ConfigError)
    _check_pair("image_size", config.image_size)
    _check_pair("patch_size", config.patch_size)
    for whole, part in zip(config.image_shape, config.patch_shape, strict=True):
        if whole % part:
            raise ConfigError(
                f"patch_size={config.patch_size} must divide image_size={config.image_size}"
            )
    if config.num_patches > config.max_position_embeddings:
        raise ConfigError(
            f"max_position_embeddings={config.max_position_embeddings} is less than the "
            f"{config.num_patches} patches of an image; use at least that"
        )
    _check_stem(config)


def _check_image(config: Fields) -> None:
    _check_patches(config)
    if config.head_dim % 4:
        raise ConfigError(
            f"head_dim={config.head_dim} must be a multiple of 4 for modality='image': one half "
            "of a head is turned by the row, the other by the column"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(
            f"rope_parameters['rope_type']={kind!r} is for texts; modality='image' needs 'default'"
        )


def _check_pair(name: str, value: Any) -> None:
    sizes = value if isinstance(value, (list, tuple)) else [value, value]
    if len(sizes) != 2 or any(type(one) is not int or one < 1 for one in sizes):
        raise ConfigError(
            f"{name}={value!r} must be a number of pixels, or [height, width], of images"
        )


def _check_audio(config: Fields) -> None:
    bins = config.num_mel_bins
    if type(bins) is not int or bins < 1:
        raise ConfigError(
            f"num_mel_bins={bins!r} must be the numbers per frame, at least 1, for models of sounds"
        )
    for name in ("conv_kernel", "conv_stride"):
        sizes = getattr(config, name)
        if (
            not isinstance(sizes, (list, tuple))
            or not sizes
            or any(type(size) is not int or size < 1 for size in sizes)
        ):
            raise ConfigError(
                f"{name}={sizes!r} must be a list of whole numbers, one for each convolution"
            )
    if len(config.conv_kernel) != len(config.conv_stride):
        raise ConfigError(
            f"conv_stride={config.conv_stride} must have as many entries as "
            f"conv_kernel={config.conv_kernel}"
        )
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        if stride > kernel:
            raise ConfigError(
                f"conv_stride={config.conv_stride} steps over frames that no kernel of "
                f"conv_kernel={config.conv_kernel} reads; use strides of at most the kernels"
            )
