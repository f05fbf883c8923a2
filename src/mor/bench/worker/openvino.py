"""OpenVINO's engine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from .peer import Peer, Trace, library, versions


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
