"""What a request may ask for, checked field by field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mor.checks import check_choice, check_flag, check_real, check_whole
from mor.engine.outputs import OutputKind
from mor.errors import MorError

MAX_LOGPROBS = 20


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) and t for t in texts):
        raise MorError(f"{name}={value!r} must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = (value,) if isinstance(value, int) else value
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise MorError(f"{name}={value!r} must be a list of token ids")
    for one in ids:
        check_whole(f"{name}: token id", one, 0)
    return tuple(ids)


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when to stop. Every field has its usual meaning.

    Attributes:
        max_tokens: at most so many new tokens; None for as many as fit.
        temperature: 0 is greedy, the exact argmax.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p.
        min_p: keep tokens of at least this share of the likeliest one's probability.
        repetition_penalty: logits of tokens in prompt and output are divided (multiplied where
            negative) by it (arXiv 1909.05858); 1 is none.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, from the
            logits of tokens in the output.
        logit_bias: added to the logits of these token ids.
        seed: the draws of this request depend on it alone, whoever is in the batch. Completion i
            of n uses seed + i. None draws a seed.
        stop: texts that end a completion; the text is cut before them.
        stop_token_ids: token ids that end a completion, the model's end of text apart.
        ignore_eos: go on past the model's end of text.
        logprobs: return the log-probability of each token and of the so many likeliest ones; None
            returns nothing. They are the model's, before penalties and temperature.
        prompt_logprobs: the same for each token of the prompt but the first, each after those
            before it. ``max_tokens`` may be 0 then: the prompt is read and nothing is added.
        prompt_logprobs_start: place in the prompt of the first token that is scored, at least 1.
            What lies before may come from the cache of prefixes.
        n: completions of the prompt.
        max_depth: depth cap of this request, 1..R.
        boundaries: what a token's score must exceed to run each depth (logits, R of them), in place
            of the checkpoint's; only for routers that store boundaries. They set this request's
            capacity: see :mod:`mor.eval.levels`.
        min_tokens: nothing ends a completion before so many new tokens, but its grammar.
        bad_words: sequences of token ids that are not completed in the output.
        skip_special_tokens: leave special tokens out of the text.
        include_stop: the stop text, or the text of the stop id, that ended it is part of the text.
        grammar: what the output must look like (:class:`mor.engine.constraint.Grammar`); it is
            over where the grammar is.
        output_kind: what :meth:`Engine.step` tells of a completion: ``cumulative``, all of it at
            each new token; ``delta``, tokens, text, depths and log-probabilities since the last
            time; ``final_only``, nothing until a completion of the request ends. The last two
            do not copy all tokens so far for each new one.

    Raises:
        MorError: naming the first wrong field, its value and what would be right.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 1
    n: int = 1
    max_depth: int | None = None
    boundaries: Sequence[float] | None = None
    min_tokens: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    skip_special_tokens: bool = True
    include_stop: bool = False
    grammar: Any = None
    output_kind: OutputKind = "cumulative"

    def __post_init__(self) -> None:
        """Check every field; texts and ids become tuples."""
        if self.prompt_logprobs is not None:
            check_whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        check_whole("prompt_logprobs_start", self.prompt_logprobs_start, 1)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0)
        check_real("temperature", self.temperature, 0.0, math.inf)
        check_whole("top_k", self.top_k, 0)
        check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        check_real("min_p", self.min_p, 0.0, 1.0)
        check_real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not isinstance(self.logit_bias, dict):
            raise MorError(f"logit_bias={self.logit_bias!r} must map token ids to numbers")
        for token, bias in self.logit_bias.items():
            check_whole("logit_bias: token id", token, 0)
            check_real(f"logit_bias[{token}]", bias, -100.0, 100.0)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
        object.__setattr__(self, "stop", _texts("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        check_flag("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            check_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        check_whole("n", self.n, 1)
        if self.max_depth is not None:
            check_whole("max_depth", self.max_depth, 1)
        if self.boundaries is not None:
            if not isinstance(self.boundaries, (list, tuple)):
                raise MorError(f"boundaries={self.boundaries!r} must be a list of numbers")
            for place, boundary in enumerate(self.boundaries):
                check_real(f"boundaries[{place}]", boundary, -math.inf, math.inf)
            object.__setattr__(self, "boundaries", tuple(self.boundaries))
        check_flag("skip_special_tokens", self.skip_special_tokens)
        check_flag("include_stop", self.include_stop)
        check_choice("output_kind", self.output_kind, OutputKind)
        self._check_restrictions()

    def _check_restrictions(self) -> None:
        check_whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise MorError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )
        if not isinstance(self.bad_words, (list, tuple)):
            raise MorError(f"bad_words={self.bad_words!r} must be a list of lists of token ids")
        words = tuple(_ids("bad_words", word) for word in self.bad_words)
        if () in words:
            raise MorError("bad_words holds an empty list; give at least one token id in each")
        object.__setattr__(self, "bad_words", words)
        if self.grammar is not None and not callable(getattr(self.grammar, "begin", None)):
            raise MorError(f"grammar={self.grammar!r} must have a method begin(); see the protocol")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def plain(self) -> bool:
        """Whether logits are taken as they come, and no more is told of them.

        Up to a draw; and ``min_tokens`` apart, which counts only so far.
        """
        told = self.logprobs is not None
        restricted = self.grammar is not None or bool(self.bad_words)
        return not (told or self.logit_bias or self.penalised or restricted)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            MorError: naming the field.
        """
        named = [("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)]
        named += [("bad_words", word) for word in self.bad_words]
        for name, ids in named:
            for token in ids:
                if token >= vocab_size:
                    raise MorError(
                        f"{name} names token id {token}; vocab_size={vocab_size} allows "
                        f"0..{vocab_size - 1}"
                    )
