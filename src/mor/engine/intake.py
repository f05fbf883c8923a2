"""What comes in: prompts as token ids, and the check that they can be served at all."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mor.checks import check_whole
from mor.config import MoRConfig
from mor.data import prompt_tokens
from mor.engine.embedded import EmbeddedPrompt
from mor.engine.fitting import is_too_long
from mor.engine.params import SamplingParams
from mor.engine.request import Request
from mor.engine.store import KVStore
from mor.engine.text import GrowingText
from mor.errors import MorError
from mor.model.servable import Servable


class TooLong(MorError):
    """Prompt and answer together are more tokens than one request may have."""


Prompt = str | Sequence[int]
"""A text, or token ids (an :class:`EmbeddedPrompt` where some places carry embeddings)."""


def pair_prompts(
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with what is asked for it, the answer to be told as a whole.

    Args:
        prompts: texts or lists of token ids, or one of them.
        params: one for all prompts, or one for each.

    Raises:
        MorError: there are not as many ``params`` as prompts.
    """
    single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    every: list[Any] = [prompts] if single else list(prompts)
    given = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(every)
    asked = [replace(own, output_kind="final_only") for own in given]
    if len(asked) != len(every):
        raise MorError(f"params has {len(asked)} entries for {len(every)} prompts; give one each")
    return list(zip(every, asked, strict=True))


def prompt_ids(
    prompt: Prompt, tokenizer: Any, config: MoRConfig, most: int | None = None
) -> tuple[int, ...]:
    """Ids of a prompt; a text is begun as the model's texts are (`mor.data.bos.prompt_tokens`).

    Args:
        prompt: text or token ids.
        tokenizer: for a text.
        config: the model's.
        most: tokens that fit. A prompt that is much longer is refused before each of its tokens is
            made or looked at; one a little longer comes back.

    Raises:
        TooLong: it is.
        MorError: no tokenizer for a text, nothing in it, ids that the model does not have.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise MorError("prompt is a text, but the engine has no tokenizer; give token ids")
        if most is not None and is_too_long(prompt, tokenizer, most):
            raise TooLong(
                f"prompt of {len(prompt)} characters has more than the {most} tokens that fit; "
                "shorten it"
            )
        ids = prompt_tokens(prompt, tokenizer, config)
    else:
        ids = list(prompt)
    if not ids:
        raise MorError("prompt is empty; give at least one token")
    if most is not None and len(ids) > most:
        raise TooLong(
            f"prompt of {len(ids)} tokens is past max_model_len={most}; with the answer at most "
            f"{most} fit"
        )
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < config.vocab_size:
        return tuple(ids)  # nearly always, and many times faster than one by one
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise MorError(f"prompt holds {token!r}; it must be a text or a list of token ids")
        if not 0 <= token < config.vocab_size:
            raise MorError(
                f"prompt holds token id {token}; vocab_size={config.vocab_size} allows "
                f"0..{config.vocab_size - 1}"
            )
    return tuple(ids)


def end_ids(model: Servable) -> frozenset[int]:
    """Token ids that end a text, as ``model.generate`` takes them."""
    found = None
    if model.generation_config is not None:
        found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


@dataclass(frozen=True)
class Intake:
    """Makes requests, and refuses those that could never be served.

    Attributes:
        config: the model's.
        store: whose pool they have to fit.
        tokenizer: for texts; None where there is none.
        ends: token ids that end a text.
        max_model_len: most tokens of prompt and output together.
        max_depth: depth cap of the engine.
        like: a weight of the network, whose type and device embeddings get.
    """

    config: MoRConfig
    store: KVStore
    tokenizer: Any
    ends: frozenset[int]
    max_model_len: int
    max_depth: int
    like: Tensor

    def requests(self, name: str, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """One request for each of the ``params.n`` completions.

        Raises:
            MorError: see :meth:`mor.engine.Engine.add_request`.
        """
        arrival = time.perf_counter()
        ids = prompt_ids(prompt, self.tokenizer, self.config, self.max_model_len)
        params.check_vocabulary(self.config.vocab_size)
        if params.stop and self.tokenizer is None:
            raise MorError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        self._check_boundaries(params)
        limit = self._limit(params)
        max_new = self._room(len(ids), params)
        embedded = None
        if isinstance(prompt, EmbeddedPrompt):
            embedded = prompt.fit(self.config.hidden_size, self.like.dtype, self.like.device)
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.ends
        seed = random.SystemRandom().getrandbits(62) if params.seed is None else params.seed
        return [
            Request(
                group=name,
                index=index,
                prompt=ids,
                params=params,
                max_new=max_new,
                limit=limit,
                stop_ids=ends,
                draw=random.Random(seed + index),
                text=self._make_text(params),
                arrival=arrival,
                constraint=None if params.grammar is None else params.grammar.begin(),
                embedded=embedded,
            )
            for index in range(params.n)
        ]

    def _make_text(self, params: SamplingParams) -> GrowingText | None:
        if self.tokenizer is None:
            return None
        return GrowingText(
            self.tokenizer,
            tuple(params.stop),
            skip_special=params.skip_special_tokens,
            include_stop=params.include_stop,
        )

    def _check_boundaries(self, params: SamplingParams) -> None:
        if params.boundaries is None:
            return
        if self.config.router not in ("expert_choice", "threshold"):
            raise MorError(
                f"boundaries cannot be set where router={self.config.router!r} stores none; only "
                "expert_choice and threshold decide by boundaries"
            )
        if len(params.boundaries) != self.config.num_recursions:
            raise MorError(
                f"boundaries has {len(params.boundaries)} entries; num_recursions="
                f"{self.config.num_recursions} of them, one per depth, are right"
            )

    def _limit(self, params: SamplingParams) -> int:
        if params.max_depth is None:
            return self.max_depth
        check_whole("max_depth", params.max_depth, 1, self.config.num_recursions)
        limit = min(params.max_depth, self.max_depth)
        if self.config.interleaved and limit != self.max_depth:
            raise MorError(
                f"max_depth={params.max_depth} cannot be asked for by one request where "
                f"sharing={self.config.sharing!r} runs all depths in one pass; set the engine's"
            )
        return limit

    def _room(self, prompt: int, params: SamplingParams) -> int:
        """Most new tokens: what was asked for, or what fits."""
        fits, held = self.max_model_len, self.store.longest(self.max_depth)
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if prompt + wanted > fits or prompt > held:
            # The pool holds so many and no more: see `Sizes.fit`.
            pool = self.store.pool.num_pages
            scarce = fits == held + 1
            why = f"the {fits} that num_pages={pool} hold" if scarce else f"max_model_len={fits}"
            raise TooLong(
                f"prompt of {prompt} tokens and max_tokens={params.max_tokens} are past {why}; "
                "shorten one of them"
            )
        return fits - prompt if params.max_tokens is None else params.max_tokens
