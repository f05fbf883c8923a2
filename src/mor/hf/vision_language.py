"""``MoRForConditionalGeneration``: a language model that reads images, or hears sounds, as LLaVA.

Patches stand at the places of the ``<image>`` tokens, or frames at those of ``<audio>``, and go
through the network like any token: each by its own depth, into the same cache.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from mor.config import ConfigError, MoRConfig
from mor.hf.arguments import ArgumentError
from mor.hf.generation import DepthGeneration
from mor.hf.modeling import MoRForCausalLM
from mor.hf.outputs import MoRCausalLMOutput
from mor.hf.pretrained import MoRPreTrainedModel
from mor.model.image_prefix import AudioPrefix, ImagePrefix
from mor.model.model import MoRModel

# Ways of decoding that guess tokens ahead: they run prompts in other pieces than ours is made in.
_MEDIA = ("pixel_values", "input_features")
_GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class MoRForConditionalGeneration(MoRForCausalLM, GenerationMixin):  # type: ignore[misc]
    """Text from images, or sounds, and text; ``AutoModelForImageTextToText`` makes it of a folder.

    The language model is that of :class:`mor.hf.MoRForCausalLM`, under the same names, so that a
    folder of one loads here, with an image part that has still to be trained. ``config`` needs
    ``image_token_id``, ``image_size`` and ``patch_size``; or ``audio_token_id`` and
    ``num_mel_bins``.
    """

    input_modalities: Any = ("image", "text")

    def __init__(self, config: MoRConfig) -> None:
        if config.image_token_id is None and config.audio_token_id is None:
            raise ConfigError(
                "image_token_id=None: MoRForConditionalGeneration needs the token that images "
                "stand at, with image_size and patch_size; or audio_token_id, with num_mel_bins"
            )
        # Not MoRForCausalLM's: weights are given their first values once all are there.
        MoRPreTrainedModel.__init__(self, config)
        self.loss_type = "ForCausalLM"
        self.model = MoRModel(config)
        if config.audio_token_id is None:
            self.image_prefix = ImagePrefix(config)
        else:
            self.audio_prefix = AudioPrefix(config)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [N, P, D] of images [N, C, H, W], or [B, M, C, H, W] laid end to end.

        Raises:
            ValueError: images of another shape than the configuration's.
        """
        if self.config.image_token_id is None:
            raise ArgumentError(
                "pixel_values are for models that read images; this one hears sounds"
            )
        pixels = pixel_values.flatten(0, 1) if pixel_values.dim() == 5 else pixel_values
        found: Tensor = self.image_prefix(pixels)
        return found

    def get_audio_features(
        self, input_features: Tensor, feature_attention_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Embeddings [n, D] of each sound of frames [N, T, num_mel_bins].

        Args:
            input_features: as the feature extractor makes them.
            feature_attention_mask: [N, T] 1 for real frames; None where all are.

        Raises:
            ArgumentError: a model that reads images.
            ValueError: frames of another width, or a sound that is all padding.
        """
        if self.config.audio_token_id is None:
            raise ArgumentError(
                "input_features are for models that hear sounds; this one reads images"
            )
        hidden, lengths = self.audio_prefix(input_features, feature_attention_mask)
        return [row[:length] for row, length in zip(hidden, lengths, strict=True)]

    def embed_sounds(
        self,
        input_ids: Tensor,
        input_features: Tensor,
        feature_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T], with the sounds' at the ``<audio>`` places, in order.

        Raises:
            ValueError: as many places as frames make tokens are not there, or a row has part of a
                sound.
        """
        features = self.get_audio_features(input_features, feature_attention_mask)
        audio: Any = self.config.audio_token_id
        places = input_ids.eq(audio)
        rows, sizes = places.sum(1).tolist(), [len(one) for one in features]
        # Whole sounds to each row: sums of sizes from the first on are all sums of rows.
        ends = set(itertools.accumulate(sizes, initial=0))
        if sum(rows) != sum(sizes) or not ends.issuperset(itertools.accumulate(rows)):
            raise ValueError(
                f"input_ids has {rows} places with audio_token_id={audio} per row; input_features "
                f"holds sounds of {sizes} tokens, each of which takes so many places of one row"
            )
        embeds = self.model.embed(input_ids)
        return embeds.masked_scatter(places[..., None], torch.cat(features).to(embeds.dtype))

    def embed_prompt(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Embeddings [B, T, D] of ids [B, T], with the images' at the ``<image>`` places, in order.

        Raises:
            ValueError: as many places as patches are not there, or a row has part of an image.
        """
        features = self.get_image_features(pixel_values)
        image: Any = self.config.image_token_id
        places = input_ids.eq(image)
        count, size = features.shape[0], features.shape[1]
        rows = places.sum(1).tolist()
        if sum(rows) != count * size or any(found % size for found in rows):
            raise ValueError(
                f"input_ids has {rows} places with image_token_id={self.config.image_token_id} "
                f"per row; pixel_values holds {count} images of {size} patches each, which takes "
                f"{count * size} places, {size} for each image of a row"
            )
        embeds = self.model.embed(input_ids)
        return embeds.masked_scatter(places[..., None], features.to(embeds.dtype))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MoRCausalLMOutput | tuple:
        """Logits, loss, depths and cache for ids [B, T] and the images or sounds among them.

        Args:
            input_ids: [B, T], with ``config.image_token_id`` once for each patch of an image.
            pixel_values: [N, C, H, W] all images of the batch in the order of their places, or
                [B, M, C, H, W]; None for text alone, or where the images are cached.
            input_features: [N, F, num_mel_bins] all sounds of the batch in the order of their
                places, of models that hear them.
            feature_attention_mask: [N, F], 1 for real frames.
            inputs_embeds: [B, T, D] in place of all of them.
            kwargs: as for :class:`mor.hf.MoRForCausalLM`. ``labels`` should be -100 at the places
                of images, as those of Transformers' own models.

        Raises:
            ArgumentError: an unknown argument, or one that is not supported.
            ValueError: wrong shapes, or places and images that do not fit each other.
        """
        if pixel_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("pixel_values go with input_ids, and not with inputs_embeds")
            inputs_embeds, input_ids = self.embed_prompt(input_ids, pixel_values), None
        if input_features is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("input_features go with input_ids, and not with inputs_embeds")
            inputs_embeds = self.embed_sounds(input_ids, input_features, feature_attention_mask)
            input_ids = None
        return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    # With the signature of the original: PEFT and pipelines read it.
    @functools.wraps(DepthGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As in every model, with ``pixel_values`` [N, C, H, W] for the images of ``input_ids``.

        Or ``input_features`` [N, F, num_mel_bins] and ``feature_attention_mask`` for its sounds.

        Raises:
            ArgumentError: a way of decoding that does not go with images.
            ValueError: places and images that do not fit each other.
        """
        named = next((name for name in _MEDIA if kwargs.get(name) is not None), None)
        if named is None:
            return super().generate(*args, **kwargs)
        for name in _GUESSING:
            if kwargs.get(name) is not None:
                raise ArgumentError(f"{name} does not go with {named}; leave it out")
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is None:
            raise ArgumentError(f"{named} need input_ids, with the places of what they hold")
        settings = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", settings.use_cache) is not False:
            # Made once, and a row's own however rows are repeated for beams and samples.
            given = kwargs.pop(named)
            mask = kwargs.pop("feature_attention_mask", None)
            with torch.no_grad():
                if named == "pixel_values":
                    kwargs["inputs_embeds"] = self.embed_prompt(ids, given)
                else:
                    kwargs["inputs_embeds"] = self.embed_sounds(ids, given, mask)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = _real(ids, self.config)
        elif named != "pixel_values":
            raise ArgumentError("use_cache=False does not go with input_features; leave it out")
        elif kwargs[named].shape[0] != ids.shape[0]:
            raise ArgumentError(
                f"use_cache=False takes one image per row; there are {kwargs[named].shape[0]} for "
                f"{ids.shape[0]} rows"
            )
        return super().generate(*args, **kwargs)


def _real(ids: Tensor, config: MoRConfig) -> Tensor:
    """[B, T] 1 for tokens, as ``generate`` itself finds them in ids where no mask is given."""
    ends: Any = config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(ids)
    return (ids != config.pad_token_id).long()


def _with_media() -> inspect.Signature:
    """The parameters of ``MoRForCausalLM.forward`` and ours: who asks is told all."""
    plain = inspect.signature(MoRForCausalLM.forward)
    own = inspect.signature(MoRForConditionalGeneration.forward).parameters
    first, ids, *others = plain.parameters.values()
    names = ("pixel_values", "input_features", "feature_attention_mask")
    more = [own[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    return plain.replace(parameters=[first, ids, *more, *others])


MoRForConditionalGeneration.forward.__signature__ = _with_media()  # type: ignore[attr-defined]
