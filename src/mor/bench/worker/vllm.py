"""vLLM on the CPU."""

from __future__ import annotations

import os
from typing import Any

from .peer import Peer, Trace, library, versions


class VLLM(Peer):
    """vLLM on the CPU, in this process."""

    def __init__(self, order: dict[str, Any]) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if order["variant"] != "float32":
            raise ValueError(f"variant {order['variant']!r} is not known; use float32")
        if order.get("threads"):
            # Left alone, vLLM keeps one core for its scheduler, of two that there may be; unbound,
            # its threads wait for each other for long wherever something else runs.
            cores = sorted(os.sched_getaffinity(0))[: order["threads"]]
            os.environ |= {
                "OMP_NUM_THREADS": str(len(cores)),
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            }
        vllm = library("vllm")
        self.vllm = vllm
        self.engine = vllm.LLM(
            model=order["folder"],
            skip_tokenizer_init=True,
            dtype="float32",
            max_num_seqs=order["max_num_seqs"],
            max_model_len=order["max_model_len"],
            enable_prefix_caching=False,
            disable_log_stats=True,
        ).llm_engine
        self.versions = versions("vllm-cpu", "vllm", "torch", "transformers")
        self.details = {"dtype": "float32"}
        self.open: dict[str, Trace] = {}

    def add(self, number: int, trace: Trace) -> None:
        """Ids in."""
        params = self.vllm.SamplingParams(
            temperature=0.0,
            max_tokens=trace.new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=library("vllm.sampling_params").RequestOutputKind.DELTA,
        )
        self.open[str(number)] = trace
        self.engine.add_request(str(number), {"prompt_token_ids": trace.prompt}, params)

    def step(self) -> int:
        """One step; outputs hold what is new, as ours do."""
        ended = 0
        for output in self.engine.step():
            trace = self.open[output.request_id]
            trace.got(list(output.outputs[0].token_ids))
            if output.finished:
                del self.open[output.request_id]
                ended += 1
        return ended
