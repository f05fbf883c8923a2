"""Transformers on static batches."""

from __future__ import annotations

import os
from typing import Any

from .peer import Peer, Trace, clock, library, versions


class Transformers(Peer):
    """``transformers.generate`` on static batches: the next begins when the longest has ended."""

    def __init__(self, order: dict[str, Any]) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        self.torch, self.library = library("torch"), library("transformers")
        if order["variant"] != "float32":
            raise ValueError(f"variant {order['variant']!r} is not known; use float32")
        if order.get("threads"):
            self.torch.set_num_threads(order["threads"])
        self.library.utils.logging.disable_progress_bar()
        self.library.utils.logging.set_verbosity_error()
        self.model = self.library.AutoModelForCausalLM.from_pretrained(
            order["folder"], dtype=self.torch.float32
        ).eval()
        self.versions = versions("transformers", "torch")
        self.details = {"dtype": "float32", "batching": "static"}

    def run(self, traces: list[Trace], concurrency: int) -> None:
        """Batches of ``concurrency`` in order of arrival, padded on the left."""
        for first in range(0, len(traces), concurrency):
            self._batch(traces[first : first + concurrency])

    def _batch(self, traces: list[Trace]) -> None:
        torch = self.torch
        width = max(len(trace.prompt) for trace in traces)
        ids = torch.tensor([[0] * (width - len(t.prompt)) + t.prompt for t in traces])
        mask = torch.tensor([[0] * (width - len(t.prompt)) + [1] * len(t.prompt) for t in traces])
        now = clock()
        for trace in traces:
            trace.sent = now

        def note(ids: Any, *_: Any, **__: Any) -> Any:
            """Called after each token: note it for those that still want one."""
            for trace, token in zip(traces, ids[:, -1].tolist(), strict=True):
                if len(trace.tokens) < trace.new_tokens:
                    trace.got([token])
            return torch.zeros(len(traces), dtype=torch.bool)

        criteria = type("Note", (self.library.StoppingCriteria,), {"__call__": staticmethod(note)})
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max(trace.new_tokens for trace in traces),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=self.library.StoppingCriteriaList([criteria()]),
            )
