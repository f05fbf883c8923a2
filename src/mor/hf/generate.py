"""Generation that also tells how deep each token went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from mor.hf.arguments import CACHE_NAME
from mor.hf.modeling import MoRForCausalLM

# Options of ``generate`` under which a call of the model is not one token of the text.
_PLAIN = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
    "assistant_early_exit": None,
    "custom_generate": None,
}
OnToken = Callable[[int, int], None]


class _DepthStreamer(BaseStreamer):
    """Passes on each new token of one sequence with the depth of the step that made it."""

    def __init__(self, on_token: OnToken) -> None:
        self.on_token = on_token
        # By the number of tokens that the call ended with: Transformers may hand out a token a step
        # late, when the next one has run already, and run a prompt in several calls.
        self.depths: dict[int, int] = {}
        self.tokens = 0

    def put(self, value: Tensor) -> None:
        """Called by ``generate``: first with the prompt, then with each token."""
        if self.tokens:
            self.on_token(int(value.flatten()[-1]), self.depths.pop(self.tokens))
        self.tokens += value.numel()

    def end(self) -> None:
        """Called when generation ends; every token has been passed on."""


def generate_with_depths(
    model: MoRForCausalLM,
    input_ids: Tensor,
    on_token: OnToken | None = None,
    **options: Any,
) -> tuple[list[int], list[int]]:
    """``model.generate`` for one prompt, with a depth for every new token.

    The depth of a token is how many recursions ran at the position whose output it was sampled
    from: what it cost to say it.

    Args:
        model: in evaluation mode.
        input_ids: [1, T].
        on_token: called with (token id, depth) as soon as a token is there.
        options: for ``generate``; one sequence, one token for each call of the model.

    Returns:
        New token ids and their depths.

    Raises:
        ValueError: more than one prompt, or an option that makes several sequences, or several
            tokens at once.
    """
    for name, plain in _PLAIN.items():
        if options.get(name) not in (None, plain):
            raise ValueError(
                f"{name}={options[name]!r} does not go with a depth for every token; leave it out"
            )
    if input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [1, T]")
    tokens: list[int] = []
    depths: list[int] = []

    def note(token: int, depth: int) -> None:
        tokens.append(token)
        depths.append(depth)
        if on_token is not None:
            on_token(token, depth)

    streamer = _DepthStreamer(note)

    def remember(module: Any, args: Any, output: Any) -> None:
        cache = getattr(output, CACHE_NAME)
        tokens = output.depths.shape[1] if cache is None else cache.columns
        streamer.depths[tokens] = int(output.depths[0, -1])

    handle = model.register_forward_hook(remember)
    try:
        with torch.inference_mode():
            generate: Any = model.generate
            generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                **options,
            )
    finally:
        handle.remove()
    return tokens, depths
