"""One exposition of the metrics of all replicas: summed, and one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

# Gauges whose mean over replicas says something, where a sum does not.
MEANS = frozenset(
    {
        "mor:kv_cache_usage_perc",
        "mor:mean_depth",
        "mor:tokens_per_tick",
        "mor:spec_decode_num_speculative_tokens",
    }
)
PREFIX, EACH = "mor:", "mor:replica_"
OURS = "mor:http_responses"  # the front counts what clients see
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Totals(Collector):
    """What the front counts, and what replicas reported last.

    A sum never falls when a replica dies: what it had counted when it was asked last stays in the
    sum of counters and histograms. Its gauges go with it.

    Args:
        model: its name, a label of every number.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"mor:{name}", text, ["model_name", *more], registry=self.registry)

        self._responses = counter("http_responses", "Answers by status", "status")
        self.retries = counter(
            "front_retries", "Requests given to another replica before anything was sent"
        ).labels(model)
        self.lost = counter(
            "front_lost", "Requests that a dead replica left without a whole answer"
        ).labels(model)
        self._living: dict[str, list[Metric]] = {}
        self._gone: dict[str, dict[_Key, float]] = {}
        self.registry.register(self)

    def answered(self, status: int) -> None:
        """Count an answer of any path."""
        self._responses.labels(self.model, str(status)).inc()

    def take(self, told: Iterable[Mapping[str, Any]]) -> None:
        """Note what replicas say now; those that say nothing are gone."""
        now = {
            str(one["name"]): list(text_string_to_metric_families(one["metrics"])) for one in told
        }
        for name, families in self._living.items():
            self._gone[name] = dict(_samples(families, lasting=True))
        for name in now:  # one that was only late
            self._gone.pop(name, None)
        self._living = now

    def text(self, told: Sequence[Mapping[str, Any]]) -> bytes:
        """The exposition, with what replicas say now."""
        self.take(told)
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """Sums under the names that a single server has, then each replica's own."""
        sums: dict[_Key, float] = {}
        for left in self._gone.values():
            for key, value in left.items():
                sums[key] = sums.get(key, 0.0) + value
        kinds: dict[str, tuple[str, str]] = {}
        each: dict[str, Metric] = {}
        for replica, families in self._living.items():
            for key, value in _samples(families, lasting=False):
                sums[key] = sums.get(key, 0.0) + value
            for family in families:
                kinds.setdefault(family.name, (family.documentation, family.type))
                name = EACH + family.name.removeprefix(PREFIX)
                one = each.setdefault(name, Metric(name, family.documentation, family.type))
                for sample in family.samples:
                    label = {**sample.labels, "replica": replica}
                    own = EACH + sample.name.removeprefix(PREFIX)
                    one.add_sample(own, label, sample.value)
        alive = Metric("mor:replicas", "Replicas that answer", "gauge")
        alive.add_sample("mor:replicas", {"model_name": self.model}, float(len(self._living)))
        yield alive
        yield from self._sums(sums, kinds)
        yield from each.values()

    def _sums(
        self, sums: Mapping[_Key, float], kinds: Mapping[str, tuple[str, str]]
    ) -> Iterable[Metric]:
        for name, (text, kind) in kinds.items():
            if name == OURS:
                continue
            family = Metric(name, text, kind)
            for (sample, labels), value in sums.items():
                if _family(sample, kind) == name:
                    share = len(self._living) if name in MEANS else 1
                    family.add_sample(sample, dict(labels), value / share)
            yield family


def _family(sample: str, kind: str) -> str:
    """The family that a sample of this kind belongs to."""
    ends = {"counter": ("_total", "_created"), "histogram": ("_bucket", "_count", "_sum")}
    for end in ends.get(kind, ()):
        if sample.endswith(end):
            return sample.removesuffix(end)
    return sample


def _samples(families: Iterable[Metric], lasting: bool) -> Iterable[tuple[_Key, float]]:
    """Names and labels with their values; with ``lasting`` those alone that only grow."""
    for family in families:
        if lasting and family.type not in ("counter", "histogram"):
            continue
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield (sample.name, tuple(sorted(sample.labels.items()))), sample.value
