"""A model of ours as lm-eval asks it: log-likelihoods under the causal rule, and generation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mor.checks import check_flag, check_whole
from mor.engine import Engine, SamplingParams
from mor.errors import MorError
from mor.eval.harness.batches import score_in_engine
from mor.eval.harness.devices import choose_device
from mor.hf.load import load_model, load_tokenizer, serving_copy
from mor.hf.modeling import MoRForCausalLM

Ids = list[int]
Pair = tuple[Any, Ids, Ids]
Score = tuple[float, bool]

# What a task may ask of generation, and what it may say that changes nothing here.
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed")


@register_model("mor")
class MorLM(TemplateLM):
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
        model.to(choose_device(device))  # type: ignore[arg-type]
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

    # Likelihoods ---------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Score]:
        """Log-likelihood (nats) of each continuation, and whether it is the greedy one.

        Requests that are the same up to the last token, such as the letters A to D after one
        question, are one row. With ``engine`` all go through the engine, but those of one token
        more than it takes.
        """
        quiet = disable_tqdm or not Console(stderr=True).is_terminal
        if not self.engine:
            return self._score_rows(requests, quiet)
        engine, scores = self._open_engine(), dict[int, Score]()
        pairs = [self._cut(context, ids) for _, context, ids in requests]
        fits = [sum(map(len, pair)) <= engine.max_model_len for pair in pairs]
        inside = [number for number, fit in enumerate(fits) if fit]
        outside = [number for number, fit in enumerate(fits) if not fit]
        found = score_in_engine(engine, [pairs[number] for number in inside], quiet)
        scores |= zip(inside, found, strict=True)
        rest = self._score_rows([requests[number] for number in outside], quiet)
        scores |= zip(outside, rest, strict=True)
        return [scores[number] for number in range(len(requests))]

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

    def _score_rows(self, requests: Sequence[Pair], quiet: bool) -> list[Score]:
        """In batches of rows, padded on the left."""
        asked: dict[tuple[int, ...], list[tuple[int, Ids]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            row = [token for part in self._cut(context, continuation) for token in part][:-1]
            asked.setdefault(tuple(row), []).append((number, continuation))
        rows = sorted(asked, key=lambda row: (-len(row), row))
        scores: dict[int, Score] = {}
        starts = range(0, len(rows), self.batch_size)
        console = Console(stderr=True)
        for start in track(starts, "log-likelihoods", console=console, disable=quiet):
            batch = rows[start : start + self.batch_size]
            for tokens, logprobs in zip(batch, self._logprobs(batch, asked), strict=True):
                for number, continuation in asked[tokens]:
                    scores[number] = _score(logprobs, continuation)
        return [scores[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _logprobs(
        self, rows: list[tuple[int, ...]], asked: dict[tuple[int, ...], list[tuple[int, Ids]]]
    ) -> Iterator[Tensor]:
        """Log-probabilities [L, V] after the last L tokens of each row; L the longest asked for."""
        width = max(map(len, rows))
        keep = max(len(ids) for row in rows for _, ids in asked[row])
        # Padding on the left: what is asked for is then at the end of every row.
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = self.model(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            use_cache=False,
            routing="causal",
            max_depth=self.max_depth,
            logits_to_keep=keep,
        )
        for logits in output.logits:
            yield F.log_softmax(logits.float(), dim=-1).cpu()

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
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
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


def _score(logprobs: Tensor, continuation: Ids) -> Score:
    own = logprobs[-len(continuation) :]
    ids = torch.tensor(continuation)
    likelihood = float(own.gather(1, ids[:, None]).double().sum())
    return likelihood, bool((own.argmax(-1) == ids).all())
