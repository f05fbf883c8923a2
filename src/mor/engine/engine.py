"""Many requests at once, tokens of all depths in one batch; see docs/engine.md."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mor.engine.attend import PagedAttention
from mor.engine.entries import KVCacheType
from mor.engine.forms import AttentionName, name_of
from mor.engine.intake import Prompt, pair_prompts
from mor.engine.integrity import check_residents
from mor.engine.landing import note_capped, note_entered
from mor.engine.memory import resident_memory
from mor.engine.opening import load_servable
from mor.engine.options import check_speculation, resolve_sizes
from mor.engine.outputs import RequestOutput
from mor.engine.params import SamplingParams
from mor.engine.parts import Parts, make_plan
from mor.engine.request import Request
from mor.engine.scheduler import Policy
from mor.engine.stats import EngineStats
from mor.engine.telling import tell_completion
from mor.errors import MorError
from mor.folder.tokenizer import load_tokenizer
from mor.model.packed import Quantization
from mor.model.servable import Servable


class Engine:
    """Continuous depth-wise batching over a paged cache of keys and values per depth.

    Args:
        model: a model in evaluation mode, or a model folder or run folder (float32, on the CPU).
        tokenizer: for prompts and outputs as text; a folder brings its own.
        max_num_seqs: new tokens that one pass of the block carries, whatever their depths.
        max_residents: requests that hold pages at a time; default twice ``max_num_seqs``, so that
            tokens waiting for the coda leave no place in the block empty.
        min_gather: tokens that wait for the coda, the head and the next prelude before these run
            for all of them; default half of ``max_num_seqs``.
        prefill_chunk: tokens of prompts that one pass of the block carries beside new tokens.
        page_size: tokens per page (of one layer).
        num_pages: pages in the pool; default as many as ``max_residents`` sequences of
            ``max_model_len`` can use, within ``memory_fraction``.
        memory_fraction: share of the free memory that the pool may take.
        max_model_len: most tokens of prompt and output together; default the model's maximum.
            The attribute is less where the pool holds less.
        max_depth: depth cap for all requests.
        policy: ``refill``; or the baselines ``no_refill`` (a token waits for its batch) and
            ``full_depth`` (every token runs all recursions, whatever the router says).
        quantization: ``int8`` for weights of 8 bits on the CPU; see
            :func:`mor.model.packed.serving_view`.
        kv_cache_dtype: of keys and values: ``auto`` (the model's), ``bfloat16``, ``int8``, ``fp8``.
        release_weights: free the plain weights where they are packed too; ``model`` cannot run
            afterwards. Those of a folder always are.
        static_stages: padded stages over static buffers, captured as graphs on CUDA, whose answers
            are read one tick late; default where the form of attention is for that.
        attention: form of paged attention (docs/engine.md), or ``auto``; the attribute is its name.
        speculate: most tokens that are guessed at a low depth before they are checked together
            (docs/engine.md); none while that does not pay, unless ``speculate_always``.
        draft_depth: recursions that a guess may take.
        prefix_caching: share pages between requests that begin alike. After the weights have been
            changed in place, call :meth:`forget_prefixes`.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """

    def __init__(
        self,
        model: Servable | str | Path,
        tokenizer: Any = None,
        *,
        max_num_seqs: int = 32,
        max_residents: int | None = None,
        min_gather: int | None = None,
        prefill_chunk: int = 64,
        page_size: int = 16,
        num_pages: int | None = None,
        memory_fraction: float = 0.5,
        max_model_len: int | None = None,
        max_depth: int | None = None,
        policy: Policy = "refill",
        quantization: Quantization | None = None,
        attention: AttentionName | PagedAttention | None = None,
        prefix_caching: bool = True,
        kv_cache_dtype: KVCacheType = "auto",
        release_weights: bool = False,
        static_stages: bool | None = None,
        speculate: int = 0,
        draft_depth: int = 1,
        speculate_always: bool = False,
    ) -> None:
        if isinstance(model, (str, Path)):
            tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            model, release_weights = load_servable(model), True
        if model.training:
            raise MorError("model is in training mode; call model.eval() before serving it")
        config = self.config = model.config
        sizes = self.sizes = resolve_sizes(
            config, max_num_seqs=max_num_seqs, max_residents=max_residents, min_gather=min_gather,
            prefill_chunk=prefill_chunk, page_size=page_size, max_model_len=max_model_len,
            max_depth=max_depth,
        )  # fmt: skip
        self._plan = make_plan(
            model, tokenizer, sizes, num_pages=num_pages, memory_fraction=memory_fraction,
            policy=policy, quantization=quantization, attention=attention,
            prefix_caching=prefix_caching, kv_cache_dtype=kv_cache_dtype,
            release_weights=release_weights, static_stages=static_stages,
            speculate=check_speculation(config, sizes, speculate, draft_depth, speculate_always),
        )  # fmt: skip
        sizes = self._plan.sizes  # as far as they fit into the pool
        self.max_residents, self.max_model_len = sizes.max_residents, sizes.max_model_len
        self.max_depth, self.tokenizer = sizes.max_depth, tokenizer
        self.attention = name_of(self._plan.attention)
        self.stats = EngineStats(config.num_recursions)
        self._put_together()
        self._groups: dict[str, list[Request]] = {}
        self._numbers = itertools.count()

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> str:
        """Queue a prompt; :meth:`step` works on it.

        Args:
            prompt: text (with a tokenizer), token ids, or an :class:`EmbeddedPrompt`.
            params: what is asked for; default ``SamplingParams()``.
            request_id: a name of the caller's; default a number.

        Returns:
            The request's id.

        Raises:
            MorError: an empty or too long prompt, ids outside the vocabulary, a request that could
                never fit into the pool, an id that is in use.
        """
        params = SamplingParams() if params is None else params
        name = f"request-{next(self._numbers)}" if request_id is None else request_id
        if name in self._groups:
            raise MorError(f"request_id={name!r} is in use; give each request a name of its own")
        self._groups[name] = self.intake.requests(name, prompt, params)
        self.scheduler.waiting.extend(self._groups[name])
        self.stats.requests += params.n
        return name

    def step(self) -> list[RequestOutput]:
        """One tick: gather and leave, sample, enter, run the block once.

        Returns:
            The requests that have new tokens to tell or ended, as their ``output_kind`` says.
        """
        return list(map(self._output, self._tick()))

    @torch.inference_mode()
    def _tick(self) -> dict[str, None]:
        scheduler, runner, stats, reads = self.scheduler, self.runner, self.stats, self.reads
        start, sampled = time.perf_counter(), stats.sampled
        scheduler.admit(start)
        if leaving := scheduler.select_leaving():
            self.leaving.leave(leaving)
            reads.settle(scheduler.fills_tick)  # who is read enters at once
        if entering := scheduler.select_entering():
            going, told = runner.enter(entering), partial(note_entered, scheduler, entering)
            if runner.starts_all:
                told([True] * len(going))
            else:
                reads.ask([going], told)
            stats.note_entered(len(going))
        if pieces := scheduler.select_pieces():
            runner.publish(pieces=pieces)
            ran, going = runner.tick(pieces)
            if more := note_capped(scheduler, ran, runner.recursions_per_tick):
                reads.ask([going], more)
            stats.note_ticked(len(going))
        reads.end_tick(scheduler.fills_tick)
        stats.peak_pages = self.store.pool.peak
        took, new = time.perf_counter() - start, stats.sampled - sampled
        self.drafting.note_step(took, new, scheduler.running)
        # One that was given up while its answers were on their way is not known any more.
        return {name: None for name in self.leaving.touched() if name in self._groups}

    def abort(self, request_id: str) -> RequestOutput | None:
        """Give up a request at any moment; its pages are free when this returns.

        Returns:
            What there is of it; None where no such request is under way.
        """
        if request_id not in self._groups:
            return None
        for request in self._groups[request_id]:
            if not request.finished:
                self.leaving.end(request, "abort")
        return self._output(request_id)

    @property
    def unfinished(self) -> int:
        """Completions that are waiting or running."""
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete all prompts; outputs in their order.

        Args:
            prompts: texts or lists of token ids, or one of them.
            params: one for all prompts, or one for each.

        Raises:
            MorError: see :meth:`add_request`; nothing is left behind then. Or requests of
                :meth:`add_request` are under way.
        """
        if self._groups:
            raise MorError(
                f"{len(self._groups)} requests of add_request are under way, whose outputs would "
                "be lost; finish them with step() first"
            )
        names: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, own in pair_prompts(prompts, params):
                names.append(self.add_request(prompt, own))
            while len(done) < len(names):
                for name in self._tick():
                    if all(request.finished for request in self._groups[name]):
                        done[name] = self._output(name)
        finally:
            for name in names:
                self.abort(name)
        return [done[name] for name in names]

    def check_integrity(self) -> None:
        """Free and owned pages are all pages, none twice; lengths, rows and lanes fit.

        Raises:
            MorError: what is wrong; it is a fault of the engine, not of the caller.
        """
        check_residents(self.scheduler)

    def kv_bytes(self) -> int:
        """Bytes of keys and values that are cached now."""
        return self.store.nbytes()

    def metrics(self) -> dict[str, float]:
        """Counters since the start, their quotients, and what is now, by name."""
        now = {
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "pages": self.store.pool.num_pages,
            "pages_used": self.store.pool.used,
            "pages_kept": self.store.pool.kept,
            "kv_bytes": self.kv_bytes(),
            "resident_bytes": resident_memory(),
            "speculated": self.drafting.goal,
        }
        return self.stats.numbers() | now

    def reset_stats(self) -> None:
        """Set every counter to zero."""
        self.stats.reset()
        self.store.pool.peak = self.store.pool.used

    def forget_prefixes(self) -> None:
        """Keep no text any more; requests under way go on with what they have read."""
        self.scheduler.reuse.clear()

    def restart(self) -> None:
        """Begin anew, after a :meth:`step` that raised: what it left half done is not known.

        Requests under way are lost, and so is every cached text; weights and counters stay.
        """
        self.stats.aborted += sum(not r.finished for group in self._groups.values() for r in group)
        self._groups.clear()
        # The old pages go before the new ones come.
        del self.store, self.intake, self.lanes, self.runner, self.scheduler, self.reads
        del self.leaving, self.drafting
        self._put_together()

    def _put_together(self) -> None:
        parts = Parts(self._plan, self.stats)
        self.store, self.intake, self.lanes = parts.store, parts.intake, parts.lanes
        self.runner, self.scheduler, self.reads = parts.runner, parts.scheduler, parts.reads
        self.leaving, self.drafting = parts.leaving, parts.drafting

    def _output(self, name: str) -> RequestOutput:
        group = self._groups[name]
        completions = tuple(map(tell_completion, group))
        finished = all([done.finish_reason is not None for done in completions])
        if finished:
            del self._groups[name]
        return RequestOutput(name, group[0].prompt, completions, finished)
