"""Runs one peer in a Python of its own, and does what its standard input says, line by line.

    <environment>/bin/python worker.py openvino

Standard library only, apart from the peer itself: this file runs where ``mor`` is not installed.
Each line of standard input is a JSON object with ``do``, each is answered by one line:

    {"do": "load", "folder": ..., "variant": ..., "max_num_seqs": n, "max_model_len": n,
     "threads": n, "cache": ...}
        -> {"ok": true, "versions": {...}, "details": {...}}
    {"do": "run", "requests": [{"prompt": [ids], "new_tokens": n}, ...], "concurrency": n}
        -> {"ok": true, "began": t, "ended": t, "traces": [{"sent": t, "times": [t...],
            "tokens": [ids]}, ...]}
    anything that goes wrong -> {"ok": false, "error": "..."}

Times are seconds on a clock of this process. Load is closed: ``concurrency`` clients, each of which
sends its next request when it has the whole answer to its last. Greedy, and exactly ``new_tokens``
new tokens.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import Any

clock = time.perf_counter


def library(name: str) -> Any:
    """Import what only the peer's environment has."""
    return importlib.import_module(name)


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Trace:
    """When a request was sent, and each of its tokens."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.prompt: list[int] = request["prompt"]
        self.new_tokens: int = request["new_tokens"]
        self.sent = 0.0
        self.times: list[float] = []
        self.tokens: list[int] = []

    def got(self, tokens: list[int]) -> None:
        """Note that so many new tokens have come now."""
        self.times += [clock()] * len(tokens)
        self.tokens += tokens

    def as_json(self) -> dict[str, Any]:
        """The trace as a JSON object."""
        return {"sent": self.sent, "times": self.times, "tokens": self.tokens}


class Peer:
    """What runs a model. Subclasses load it, and either step or run a whole load."""

    details: dict[str, Any]
    versions: dict[str, str]

    def run(self, traces: list[Trace], concurrency: int) -> None:
        """Closed loop over :meth:`add` and :meth:`step`."""
        waiting, running = deque(enumerate(traces)), 0
        while waiting or running:
            while waiting and running < concurrency:
                number, trace = waiting.popleft()
                trace.sent = clock()
                self.add(number, trace)
                running += 1
            running -= self.step()

    def add(self, number: int, trace: Trace) -> None:
        """Send a request."""
        raise NotImplementedError

    def step(self) -> int:
        """Do some work; how many requests ended."""
        raise NotImplementedError


class OpenVINO(Peer):
    """openvino-genai's continuous batching.

    The variant is ``float32`` or ``int8`` (weights); ``-f32cache`` behind it keeps keys and values
    in float32, where OpenVINO's own choice on a CPU is 8 bits.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        weights, _, cache = order["variant"].partition("-")
        folder = self._converted(Path(order["folder"]), Path(order["cache"]), weights)
        genai = library("openvino_genai")
        self.genai, self.ov = genai, library("openvino")
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = order["max_num_seqs"]
        scheduler.max_num_batched_tokens = max(256, order["max_num_seqs"])
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 2  # GiB
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": "1",
        }
        if order.get("threads"):
            properties["INFERENCE_NUM_THREADS"] = order["threads"]
        if cache == "f32cache":
            properties["KV_CACHE_PRECISION"] = "f32"
        self.pipe = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties, {})
        self.versions = versions("openvino", "openvino-genai", "optimum-intel")
        self.details = {"properties": properties, "weights": weights}
        self.open: dict[int, tuple[Trace, Any]] = {}

    @staticmethod
    def _converted(source: Path, cache: Path, weights: str) -> Path:
        """The model in OpenVINO's form, made once, by a child that gives its memory back."""
        target = cache / f"openvino-{weights}"
        if (target / "openvino_model.bin").is_file():
            return target
        convert = library("optimum.intel").OVModelForCausalLM
        child = os.fork()
        if child == 0:
            code = 1
            try:
                model = convert.from_pretrained(
                    str(source), export=True, compile=False, load_in_8bit=weights == "int8"
                )
                model.save_pretrained(str(target))
                code = 0
            except BaseException as error:
                print(f"conversion: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1] != 0:
            raise RuntimeError("the conversion to OpenVINO failed; see the lines above")
        return target

    def add(self, number: int, trace: Trace) -> None:
        """Ids in."""
        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = trace.new_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = self.ov.Tensor(library("numpy").array([trace.prompt], dtype="int64"))
        self.open[number] = trace, self.pipe.add_request(number, ids, config)

    def step(self) -> int:
        """One step, and what came of it."""
        self.pipe.step()
        ended = 0
        for number, (trace, handle) in list(self.open.items()):
            while handle.can_read():
                for output in handle.read().values():
                    trace.got(list(output.generated_ids))
            if len(trace.tokens) >= trace.new_tokens:
                del self.open[number]
                ended += 1
        return ended


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
            temperature=0.0, max_tokens=trace.new_tokens, ignore_eos=True, detokenize=False
        )
        self.open[str(number)] = trace
        self.engine.add_request(str(number), {"prompt_token_ids": trace.prompt}, params)

    def step(self) -> int:
        """One step; outputs hold all tokens so far."""
        ended = 0
        for output in self.engine.step():
            trace = self.open[output.request_id]
            trace.got(list(output.outputs[0].token_ids)[len(trace.tokens) :])
            if output.finished:
                del self.open[output.request_id]
                ended += 1
        return ended


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


class Fake(Peer):
    """For tests of the protocol: token i of a prompt is its first id plus i; no model at all."""

    def __init__(self, order: dict[str, Any]) -> None:
        if order["variant"] == "broken":
            raise RuntimeError("this peer does not load")
        self.wrong = order["variant"] == "wrong"
        self.versions = versions()
        self.details = {"max_num_seqs": order["max_num_seqs"]}
        self.open: list[Trace] = []

    def add(self, number: int, trace: Trace) -> None:
        """Nothing to do but remember."""
        self.open.append(trace)

    def step(self) -> int:
        """One token for each."""
        time.sleep(1e-4)
        for trace in self.open:
            trace.got([trace.prompt[0] + len(trace.tokens) + self.wrong])
        ended = [trace for trace in self.open if len(trace.tokens) == trace.new_tokens]
        self.open = [trace for trace in self.open if trace not in ended]
        return len(ended)


PEERS: dict[str, type[Peer]] = {
    "openvino": OpenVINO,
    "vllm": VLLM,
    "transformers": Transformers,
    "fake": Fake,
}


def obey(order: dict[str, Any], kind: str, peer: Peer | None) -> tuple[dict[str, Any], Peer | None]:
    """One order: its answer, and the peer as it is then."""
    if order["do"] == "load":
        peer = PEERS[kind](order)  # type: ignore[call-arg]
        return {"versions": peer.versions, "details": peer.details}, peer
    if order["do"] != "run" or peer is None:
        raise ValueError(f"cannot do {order['do']!r}, loaded: {peer is not None}")
    traces = [Trace(request) for request in order["requests"]]
    began = clock()
    peer.run(traces, order["concurrency"])
    measured = [trace.as_json() for trace in traces]
    return {"began": began, "ended": clock(), "traces": measured}, peer


def main() -> None:
    """Read orders until there are none. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    peer: Peer | None = None
    for line in sys.stdin:
        try:
            answer, peer = obey(json.loads(line), sys.argv[1], peer)
            answer = {"ok": True} | answer
        except Exception as error:  # a peer's library raises whatever it likes
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
