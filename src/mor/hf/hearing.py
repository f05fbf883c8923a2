"""``MoRAudioProcessor``: sounds and text in, what ``MoRForConditionalGeneration`` takes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class MoRAudioProcessor(ProcessorMixin):
    """A feature extractor and a tokenizer under one name.

    Each ``<audio>`` in a text becomes as many as the model makes tokens of the sound. Chat
    templates may write it for parts of type ``audio``.

    Args:
        feature_extractor: such as ``Speech2TextFeatureExtractor``, or
            :class:`mor.hf.MoRFeatureExtractor` for frames that are there already.
        tokenizer: with the token ``audio_token``.
        conv_stride: of the model, ``config.conv_stride``.
        audio_token: stands for a sound in a text.
        chat_template: Jinja text; default the tokenizer's.
    """

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        conv_stride: Sequence[int] = (2,),
        audio_token: str = "<audio>",
        chat_template: str | None = None,
    ) -> None:
        self.conv_stride, self.audio_token = list(conv_stride), audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(feature_extractor, tokenizer, chat_template=template)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``input_ids``, ``attention_mask``, ``input_features`` and ``feature_attention_mask``.

        Args:
            text: one or several, with ``audio_token`` once for each sound.
            audio: samples [n] (or frames [n, bins]) of one sound, or a list of such, in the order
                of the texts' tokens.
            sampling_rate: of the samples; the feature extractor refuses another than its own.
            return_tensors: ``pt`` for tensors.
            kwargs: for the tokenizer, such as ``padding=True``.

        Raises:
            ValueError: no text, or not as many sounds as the texts have tokens for.
        """
        if text is None:
            raise ValueError("give text, with the sounds' tokens in it")
        texts = [text] if isinstance(text, str) else list(text)
        sounds = (
            [] if audio is None else list(audio) if isinstance(audio, (list, tuple)) else [audio]
        )
        named = sum(one.count(self.audio_token) for one in texts)
        if named != len(sounds):
            raise ValueError(
                f"text holds {self.audio_token!r} {named} times, and there are {len(sounds)} "
                "sounds; write it once for each"
            )
        found: dict[str, Any] = {}
        if sounds:
            given = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
            made = self.feature_extractor(
                sounds, padding=True, return_attention_mask=True, return_tensors="pt", **given
            )
            mask = made["attention_mask"]
            found = {"input_features": made["input_features"], "feature_attention_mask": mask}
            sizes = iter([self.num_tokens(int(length)) for length in mask.sum(1)])
            texts = [self._widen(one, sizes) for one in texts]
        tokens = self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        found = {name: tokens[name] for name in ("input_ids", "attention_mask")} | found
        return BatchFeature(found, tensor_type=return_tensors)

    def num_tokens(self, frames: int) -> int:
        """Tokens that the model makes of so many frames."""
        for stride in self.conv_stride:
            frames = -(-frames // stride)
        return frames

    def _widen(self, text: str, sizes: Any) -> str:
        """``text`` with as many tokens for each of its sounds as the model makes of it."""
        first, *others = text.split(self.audio_token)
        return first + "".join(self.audio_token * next(sizes) + other for other in others)

    @property
    def model_input_names(self) -> list[str]:
        """What it makes."""
        return ["input_ids", "attention_mask", "input_features", "feature_attention_mask"]
