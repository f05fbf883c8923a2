"""A model of ours as lm-eval asks it: log-likelihoods under the causal rule, and generation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console

from mor.checks import check_flag, check_whole
from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.eval.harness.batches import score_in_engine
from mor.eval.harness.devices import choose_device
from mor.eval.harness.rows import score_rows
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model, serving_copy
from mor.hf.modeling import MoRForCausalLM

Ids = list[int]
Pair = tuple[Ids, Ids]
Score = tuple[float, bool]

# What a task may ask of generation, and what it may say that changes nothing here.
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed")


@register_model("mor")
class MorLM(LM):
    """`--model mor --model_args pretrained=DIR`.

    Args:
        pretrained: a model folder, a run folder, or the name of a model that ships.
        engine: score in the engine, with the weights that it serves (packed for the processor; with
            `quantization=int8` of 8 bits) rather than with the checkpoint's own. What questions
            have in common at their beginning, such as examples, is read once.
        batch_size: rows at a time; changes nothing but speed.
        max_length: most tokens of a row; default the model's maximum.
        max_depth: depth cap, 1..R.
        max_gen_toks: new tokens of a generation that says nothing itself.
        dtype: of the weights, such as `bfloat16`.
        device: such as `cuda:0`; default the GPU where there is one. A GPU where there is none is
            the CPU, as for `hf`: lm-eval's command asks for `cuda:0` whoever runs it.
        quantization: `int8`; needs `engine=true`.
        max_batch_size: taken and not used: lm-eval always gives it.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """

    def __init__(
        self,
        pretrained: str,
        engine: bool = False,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        max_depth: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "float32",
        device: str | None = None,
        quantization: Any = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_flag("engine", engine)
        if quantization is not None and not engine:
            raise MorError(f"quantization={quantization!r} needs engine=true")
        weights = getattr(torch, dtype, None)
        if not isinstance(weights, torch.dtype):
            raise MorError(f"dtype={dtype!r} is not known; use float32, bfloat16 or float16")
        self.tokenizer = load_tokenizer(pretrained)
        model = load_model(pretrained, weights)
        model.to(choose_device(device))
        config = model.config
        # "auto" asks for as many as fit: a fixed number does on every device that we run on.
        self.batch_size = 16 if batch_size in (None, "auto") else int(str(batch_size))
        check_whole("batch_size", self.batch_size, 1)
        self.max_length = config.max_position_embeddings if max_length is None else max_length
        check_whole("max_length", self.max_length, 2, config.max_position_embeddings)
        if max_depth is not None:
            check_whole("max_depth", max_depth, 1, config.num_recursions)
        check_whole("max_gen_toks", max_gen_toks, 1)
        self.max_depth, self.max_gen_toks = max_depth, max_gen_toks
        self.original, self.quantization, self.engine = model, quantization, engine
        self._engine: Engine | None = None

    @functools.cached_property
    def model(self) -> MoRForCausalLM:
        """What scores rows outside of the engine."""
        return serving_copy(self.original, self.quantization) if self.engine else self.original

    # Tokens --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the tokenizer's BOS, or its end of text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; BOS as the tokenizer itself does, and once where the text spells it out."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(bos)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one text."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself, or the one of a name where there are several; None for False."""
        if chat_template is False or chat_template is None:
            return None
        own = self.tokenizer.chat_template
        if not isinstance(own, dict):
            return None if own is None else str(own)
        name = chat_template if isinstance(chat_template, str) else None
        return str(self.tokenizer.get_chat_template(name))

    def split_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Token ids of both, as lm-eval's other models cut them.

        Blanks at the end of the context belong to the continuation's first token. An empty context
        is one token, :attr:`prefix_token_id`.
        """
        text, given = context + continuation, context.rstrip()
        if not given:
            ids, start = self.tok_encode(text, add_special_tokens=False), [self.prefix_token_id]
            return (ids[:1], ids[1:]) if ids[:1] == start else (start, ids)
        before = self.tok_encode(given)
        return before, self.tok_encode(text)[len(before) :]

    # Likelihoods ---------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Score]:
        """Log-likelihood (nats) of each continuation, and whether it is the greedy one."""
        pairs = [self.split_pair(*request.args) for request in requests]
        return self.score_pairs(pairs, disable_tqdm)

    def score_pairs(self, pairs: Sequence[Pair], disable_tqdm: bool = False) -> list[Score]:
        """:meth:`loglikelihood` of token ids.

        Requests that are the same up to the last token, such as the letters A to D after one
        question, are one row. With ``engine`` all go through the engine, but those of one token
        more than it takes.
        """
        quiet = disable_tqdm or not Console(stderr=True).is_terminal
        if not self.engine:
            return self._score_rows([self._cut(*pair) for pair in pairs], quiet)
        engine, scores = self._open_engine(), dict[int, Score]()
        cut = [self._cut(*pair) for pair in pairs]
        fits = [sum(map(len, pair)) <= engine.max_model_len for pair in cut]
        inside = [number for number, fit in enumerate(fits) if fit]
        outside = [number for number, fit in enumerate(fits) if not fit]
        found = score_in_engine(engine, [cut[number] for number in inside], quiet)
        scores |= zip(inside, found, strict=True)
        rest = self._score_rows([cut[number] for number in outside], quiet)
        scores |= zip(outside, rest, strict=True)
        return [scores[number] for number in range(len(pairs))]

    def _score_rows(self, pairs: Sequence[Pair], quiet: bool) -> list[Score]:
        return score_rows(self.model, pairs, self.batch_size, self.max_depth, quiet)

    def _cut(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """As much of the context as fits before the continuation.

        Raises:
            MorError: the continuation alone is too long, or empty.
        """
        if not 1 <= len(continuation) <= self.max_length:
            raise MorError(
                f"a continuation has {len(continuation)} tokens, expected 1 to max_length="
                f"{self.max_length}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token with as much before it as fits."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self.score_pairs(windows, disable_tqdm)
        for number, (score, _) in zip(owners, scores, strict=True):
            totals[number] += score
        return totals

    def _open_engine(self) -> Engine:
        """Made when it is first asked for."""
        if self._engine is None:
            self._engine = Engine(
                self.original,
                self.tokenizer,
                max_num_seqs=self.batch_size,
                prefill_chunk=256,
                max_model_len=self.max_length,
                max_depth=self.max_depth,
                quantization=self.quantization,
            )
        return self._engine

    # Generation ----------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts through the engine, all in its batches; greedy unless a task samples."""
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            own = self._sampling(options)
            room = self.max_length - int(own.max_tokens or 0)
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-max(1, room) :])
            params.append(own)
        outputs = self._open_engine().generate(prompts, params) if prompts else []
        return [output.completions[0].text or "" for output in outputs]

    def _sampling(self, options: dict[str, Any]) -> SamplingParams:
        unknown = sorted(set(options) - set(_GENERATION))
        if unknown:
            raise MorError(
                f"generation option {unknown[0]}={options[unknown[0]]!r} is not known; use some "
                f"of: {', '.join(_GENERATION)}"
            )
        until = options.get("until") or ()
        sampled = bool(options.get("do_sample")) and float(options.get("temperature", 1.0)) > 0
        return SamplingParams(
            max_tokens=min(
                int(options.get("max_gen_toks", self.max_gen_toks)), self.max_length - 1
            ),
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options.get("top_k") or 0) if sampled else 0,
            top_p=float(options.get("top_p") or 1.0) if sampled else 1.0,
            seed=int(options.get("seed", 0)),
            stop=[until] if isinstance(until, str) else [text for text in until if text],
        )
