"""``MoRProcessor``: images and text in, what ``MoRForConditionalGeneration`` takes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin


class MoRProcessor(ProcessorMixin):
    """An image processor and a tokenizer under one name.

    Each ``<image>`` in a text becomes as many as an image has patches. Chat templates may write it
    for parts of type ``image``.

    Args:
        image_processor: such as ``ViTImageProcessor``, or :class:`mor.hf.grey.MoRImageProcessor`.
        tokenizer: with the token ``image_token``.
        num_image_tokens: patches of an image, ``config.num_patches``.
        image_token: stands for an image in a text.
        chat_template: Jinja text; default the tokenizer's.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        image_token: str = "<image>",
        chat_template: str | None = None,
    ) -> None:
        self.num_image_tokens, self.image_token = num_image_tokens, image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        template = chat_template or getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        images_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``input_ids``, ``attention_mask`` and ``pixel_values`` of texts and their images.

        Args:
            images: one image, a list, or a list for each text; in the order of the texts' tokens.
            text: one text or several, with ``image_token`` once for each image.
            return_tensors: ``pt`` for tensors.
            images_kwargs: for the image processor.
            text_kwargs: for the tokenizer.
            kwargs: for the tokenizer too, such as ``padding=True``.

        Raises:
            ValueError: nothing given, or not as many images as the texts have tokens for.
        """
        if images is None and text is None:
            raise ValueError("give text, images, or both")
        found: dict[str, Any] = {}
        count = 0
        if images is not None and (flat := _flatten(images)):
            pixels = self.image_processor(
                flat, return_tensors=return_tensors, **images_kwargs or {}
            )
            found, count = {"pixel_values": pixels["pixel_values"]}, len(flat)
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            named = sum(one.count(self.image_token) for one in texts)
            if named != count:
                raise ValueError(
                    f"text holds {self.image_token!r} {named} times, and there are {count} images; "
                    "write it once for each"
                )
            long = self.image_token * self.num_image_tokens
            texts = [one.replace(self.image_token, long) for one in texts]
            given = {"return_tensors": return_tensors} | (text_kwargs or {}) | kwargs
            given.pop("return_mm_token_type_ids", None)
            tokens = self.tokenizer(texts, **given)
            found = {name: tokens[name] for name in ("input_ids", "attention_mask")} | found
        return BatchFeature(found, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """What it makes."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _flatten(images: Any) -> list[Any]:
    """Images in one list, however they are nested."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [one for group in images if group is not None for one in _flatten(group)]
