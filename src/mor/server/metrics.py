"""What Prometheus reads at ``/metrics``. Names and meaning as vLLM's, with ``mor:`` in front."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from mor.engine import Completion, Engine

FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
SLOW = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)


class _Engine(Collector):
    """The engine's own numbers, as they were asked for last."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.now: dict[str, float] = {}
        self.depths: list[int] = []
        self.labels = labels

    def collect(self) -> Iterator[Metric]:
        """Gauges of this moment, and totals since the start."""
        now = self.now
        pages = now.get("pages", 0.0)
        gauges = {
            "num_requests_running": ("Completions that hold pages", now.get("running", 0.0)),
            "num_requests_waiting": ("Completions that wait", now.get("waiting", 0.0)),
            "kv_cache_usage_perc": (
                "Pages in use, 1 is all",
                now.get("pages_used", 0.0) / pages if pages else 0.0,
            ),
            "kv_cache_bytes": ("Bytes of cached keys and values", now.get("kv_bytes", 0.0)),
            "resident_memory_bytes": (
                "Memory of the process, weights and touched pages included",
                now.get("resident_bytes", 0.0),
            ),
            "mean_depth": ("Mean recursions per token", now.get("mean_depth", 0.0)),
            "tokens_per_tick": ("Mean tokens per block pass", now.get("tokens_per_tick", 0.0)),
            "spec_decode_num_speculative_tokens": (
                "Tokens guessed at a time now, 0 while it does not pay",
                now.get("speculated", 0.0),
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"mor:{name}", text, labels=list(self.labels))
            gauge.add_metric(list(self.labels.values()), value)
            yield gauge
        totals = {
            "num_preemptions": ("Requests put back for want of pages", "preemptions"),
            "generation_tokens": ("New tokens", "sampled"),
            "ticks": ("Passes of the block", "ticks"),
            "prefix_cache_hits": ("Tokens that were cached and not computed", "reused_tokens"),
            "spec_decode_num_drafts": ("Guesses that were checked together", "drafts"),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed", "draft_tokens"),
            "spec_decode_num_accepted_tokens": ("Guesses that were right", "accepted_tokens"),
        }
        for name, (text, key) in totals.items():
            counter = CounterMetricFamily(f"mor:{name}", text, labels=list(self.labels))
            counter.add_metric(list(self.labels.values()), now.get(key, 0.0))
            yield counter
        yield self._depths()

    def _depths(self) -> Metric:
        text = "Recursions at the position that a new token was sampled from"
        family = HistogramMetricFamily("mor:token_depth", text, labels=list(self.labels))
        reached = list(accumulate(self.depths))
        buckets = [(f"{depth}.0", float(count)) for depth, count in enumerate(reached)]
        total = float(sum(depth * count for depth, count in enumerate(self.depths)))
        every = float(reached[-1]) if reached else 0.0
        family.add_metric(list(self.labels.values()), [*buckets, ("+Inf", every)], total)
        return family


class ServerMetrics:
    """Counters and histograms of one server; the engine's thread and asyncio's both write.

    Args:
        model: its name, a label of every number.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        label = {"model_name": model}
        self._engine = _Engine(label)
        self.registry.register(self._engine)

        def counter(name: str, text: str, *more: str) -> Counter:
            made = Counter(f"mor:{name}", text, ["model_name", *more], registry=self.registry)
            return made if more else made.labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"mor:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )
            return made.labels(model)

        self.model = model
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.success = counter("request_success", "Completions that ended", "finished_reason")
        self.aborted = counter("request_aborted", "Completions given up")
        self.rejected = counter("request_rejected", "Requests refused for the load (429)")
        self.restarts = counter("engine_restarts", "Starts of the engine after a failed tick")
        self.responses = counter("http_responses", "Answers by status", "status")
        self.queue = histogram("request_queue_time_seconds", "Arrival to admission", SLOW)
        self.first = histogram("time_to_first_token_seconds", "Arrival to first token", SLOW)
        self.between = histogram("inter_token_latency_seconds", "Between two tokens", FAST)
        self.total = histogram("e2e_request_latency_seconds", "Arrival to end", SLOW)

    def finished(self, done: Completion) -> None:
        """Count a completion that ended."""
        self.success.labels(self.model, done.finish_reason).inc()
        times = done.timings
        for histogram, value in (
            (self.queue, times.queue),
            (self.first, times.first_token),
            (self.total, times.total),
        ):
            if value is not None:
                histogram.observe(value)
        for value in times.between_tokens:
            self.between.observe(value)

    def answered(self, status: int) -> None:
        """Count an answer of any path."""
        self.responses.labels(self.model, str(status)).inc()

    def text(self, engine: Engine) -> bytes:
        """The exposition, with the engine's numbers of this moment; in the engine's thread."""
        self._engine.now, self._engine.depths = engine.metrics(), list(engine.stats.new_depths)
        return generate_latest(self.registry)
