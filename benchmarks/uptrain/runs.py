"""What :mod:`evidence` runs: one line per run, in the order in which they are made.

Tokens are those of one CPU core's budget. Recorded runs keep their names, so that
``benchmarks/results/uptrain.jsonl`` and this list can be read side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LONG = 245_760
"""Tokens of the long run; all others keep their proportion to it."""
SHORT = 6_144
INITS = ("stepwise", "average", "upper", "random", "lower")
NORMS = {"norms": "own"}
"""Each use has its source layer's own norms, so that only matrices are shared."""
WINDOW = {"num_prelude_layers": 1, "num_recursion_layers": 6, "num_coda_layers": 9}
"""16 of 30 layers: `mor fold-table --leave-out 14` says that layers 7-20 are missed least."""
QUIET = {"relaxation": "gains", "start_gain": 0.2, **NORMS}
LOWER = {"init": "lower", **WINDOW}
ROUTED: dict[str, Any] = {
    "model": {"router": "threshold", "update_rule": "last", "kv_sharing": "recursive_update"},
    "gain": {"margin": 0.02, "confidence": 0.5},
}
GAP: dict[str, Any] = {"rate": 5e-4, "rates": {"relaxation": 10.0}}
"""Training of what fills a gap; ``rates`` only where there are gains."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of its folder and its rows.
        group: what it is compared in.
        tokens: that it is trained on.
        fold: fields of :class:`~mor.hf.fold.plan.Folding`; the start, unless ``start`` or
            ``scratch`` is given.
        start: name of the run that it goes on from.
        scratch: nothing learnt before; the network of ``fold`` and ``model``, next-token loss.
        model: fields of the recipe's ``model``.
        rate: learning rate.
        rates: of groups, in multiples of it.
        sequences: per step, in multiples of the command's ``--batch``.
        distil: learn from the source model.
        hidden: weight of the stream's error.
        schedule: caps of depth over training, ``train.depth_schedule``.
        gain: the router alone is trained, on the frozen trunk, ``uptrain.gain``.
    """

    name: str
    group: str
    tokens: int
    fold: dict[str, Any] | None = None
    start: str | None = None
    scratch: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    rate: float = 1e-3
    rates: dict[str, float] = field(default_factory=dict)
    sequences: int = 1
    distil: bool = True
    hidden: float = 3.0
    schedule: list[Any] | None = None
    gain: dict[str, Any] | None = None


def whole(recursions: int, init: str, **more: Any) -> dict[str, Any]:
    """A folding of the whole middle: 1 + 14 x R + 1 layers at R = 2."""
    return {"num_recursions": recursions, "init": init, **NORMS, **more}


def starts() -> Iterator[Run]:
    """Every start at R = 2 and 3."""
    for recursions in (2, 3):
        for init in INITS:
            yield Run(f"r{recursions}-{init}", "start", SHORT, whole(recursions, init))


def ablations() -> Iterator[Run]:
    """From evenly spaced layers: what is learnt from, what stands beside the shared matrices."""
    base = whole(2, "stepwise")
    yield Run("r2-stepwise-undistilled", "distilled", SHORT, base, distil=False)
    yield Run("r2-stepwise-logits", "distilled", SHORT, base, hidden=0.0)
    for rank in (16, 64):
        lora = {"relaxation": "lora", "rank": rank}
        yield Run(f"r2-stepwise-lora{rank}", "rank", SHORT, whole(2, "stepwise", **lora))
    yield Run("r2-stepwise-gains", "rank", SHORT, whole(2, "stepwise", relaxation="gains"))
    yield Run("r2-random-gains", "rank", SHORT, whole(2, "random", relaxation="gains"))


def sides() -> Iterator[Run]:
    """More layers of their own at both ends, R = 3 with the same 16 layers, R = 2 with 19."""
    ends = {"num_prelude_layers": 5, "num_coda_layers": 4}
    for init in ("stepwise", "upper", "random"):
        yield Run(f"r3-5-4-{init}", "sides", SHORT, whole(3, init, **ends))
    ends = {"num_prelude_layers": 4, "num_coda_layers": 4}
    for init in ("stepwise", "upper"):
        yield Run(f"r2-4-4-{init}", "sides", SHORT, whole(2, init, **ends))


def dropped() -> Iterator[Run]:
    """Layers left out, nothing shared: evenly, and neighbouring ones."""
    evenly = {"num_recursions": 1, "init": "stepwise", "num_recursion_layers": 14}
    yield Run("dropped", "baseline", SHORT, evenly)
    window = {"num_recursions": 1, **LOWER}
    yield Run("dropped-7-20", "baseline", SHORT, window, rate=5e-4)
    smaller = window | {"num_recursion_layers": 8, "num_coda_layers": 10}
    yield Run("dropped-9-19", "baseline", SHORT, smaller, rate=5e-4)


def windows() -> Iterator[Run]:
    """The block before a window of layers fills it, more or less quietly at first."""
    for recursions, gain in ((2, 0.0), (2, 0.2), (2, 1.0), (3, 0.2)):
        fold = QUIET | LOWER | {"num_recursions": recursions, "start_gain": gain}
        yield Run(f"window-r{recursions}-gain{gain}", "window", SHORT, fold, **GAP)
    upper = {"num_prelude_layers": 5, "num_recursion_layers": 7, "num_coda_layers": 4}
    fold = QUIET | {"num_recursions": 2, "init": "upper", **upper}
    yield Run("window-r2-upper-gain0.2", "window", SHORT, fold, **GAP)


def small() -> Iterator[Run]:
    """Ten of thirty layers: what a deeper recursion is worth where more is missing."""
    ends = LOWER | {"num_recursion_layers": 4, "num_coda_layers": 5}
    # At 36k the plain one has had about the processor time of R = 4 at 24k.
    for tokens, name, deeper in (
        (SHORT, "", (2, 4)),
        (4 * SHORT, "-24k", (4,)),
        (6 * SHORT, "-36k", ()),
    ):
        plain = {"num_recursions": 1, **ends}
        yield Run(f"small-dropped{name}", "small", tokens, plain, rate=5e-4)
        for recursions in deeper:
            fold = QUIET | {"num_recursions": recursions, **ends}
            yield Run(f"small-r{recursions}{name}", "small", tokens, fold, **GAP)


def long() -> Iterator[Run]:
    """Longer runs, and what they are compared with."""
    routed: dict[str, Any] = {"model": {"router": "threshold"}}
    first = whole(2, "stepwise")
    yield Run("recursive", "long", 61_440, first)
    yield Run(
        "mor", "long", 30_720, start="recursive", rate=5e-4, rates={"routers": 10.0}, **routed
    )
    yield Run("scratch", "baseline", 15_360, first, scratch=True, **routed)
    yield Run("tenth", "long", 1_536, first)
    fold = QUIET | {"num_recursions": 2, **LOWER}
    yield Run("window", "long", LONG, fold, **GAP)
    yield Run("window-mor", "long", 61_440, start="window", rate=2.5e-4, **routed)
    plain = {"num_recursions": 1, **LOWER}
    yield Run("window-dropped", "baseline", LONG, plain, rate=5e-4)
    # What the router's stage is compared with: as many more tokens at its rate, without a router.
    for name, group in (("window", "long"), ("window-dropped", "baseline")):
        yield Run(f"{name}-more", group, 61_440, start=name, rate=2.5e-4)
    shape = {"num_recursions": 2, **LOWER, **NORMS}
    yield Run("window-scratch", "baseline", LONG * 3 // 2, shape, scratch=True, **routed)
    for rate in (5e-4, 1e-3):
        name = f"window-tenth-4x-{rate:g}"
        yield Run(name, "batch", LONG // 10, fold, sequences=4, **(GAP | {"rate": rate}))
    yield Run("window-tenth", "long", LONG // 10, fold, **GAP)


def levers() -> Iterator[Run]:
    """What made depth pay elsewhere: growth, streams, a router on the frozen trunk, passes added.

    Growth runs one pass for most of the steps, which costs what the model without recursion does.
    Where tokens differ, runs that are compared have had about the same processor time.
    """
    ends = LOWER | {"num_recursion_layers": 4, "num_coda_layers": 5}
    deep: dict[str, Any] = QUIET | {"num_recursions": 4, **ends}
    grow = [[0.6, 1], [0.4, 4]]
    streams = {"recursion_streams": 2}
    yield Run("small-r4-grow", "levers", 5 * SHORT, deep, schedule=grow, **GAP)
    yield Run("small-r4-streams", "levers", 4 * SHORT, deep, model=streams, **GAP)
    both = "small-r4-grow-streams"
    yield Run(both, "levers", 5 * SHORT, deep, model=streams, schedule=grow, **GAP)
    for name, start in (("small-gain", "small-r4-grow"), ("small-gain-both", both)):
        yield Run(name, "levers", 4 * SHORT, start=start, rate=5e-3, distil=False, **ROUTED)
    # A block of six layers that the whole source runs twice, the second time silent at first.
    whole_source = {"num_prelude_layers": 12, "num_recursion_layers": 6, "num_coda_layers": 12}
    added: dict[str, Any] = QUIET | {"num_recursions": 2, "init": "repeat", **whole_source}
    for rate in (1e-4, 3e-4):
        own = {"rate": rate, "rates": {"relaxation": 10.0}}
        fold = added | {"start_gain": 0.0}
        yield Run(f"added-r2-{rate:g}", "levers", 5 * SHORT, fold, distil=False, **own)
        fold = {"num_recursions": 1, "init": "lower", **whole_source}
        yield Run(f"added-none-{rate:g}", "levers", 6 * SHORT, fold, distil=False, rate=rate)


RUNS = [*starts(), *ablations(), *sides(), *dropped(), *windows(), *small(), *long(), *levers()]
