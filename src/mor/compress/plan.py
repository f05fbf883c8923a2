"""What a smaller or faster model may look like: how many layers stay, which block fills a gap.

Two shapes compete. ``left out`` leaves neighbouring layers out and shares none. ``recursive``
leaves them out too, and runs the layers before the gap a second time to fill it, with quiet gains
(docs/uptraining.md). At an equal number of weights the second shape is slower; at an equal speed it
has fewer weights.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from mor.config import ConfigError, MoRConfig
from mor.errors import MorError
from mor.hf.fold.plan import Folding, folded_config
from mor.model.flops import count_parameters, flops_per_token

START_GAIN = 0.2
"""Of a block's second use: the best of 0, 0.2 and 1 on SmolLM2-135M (docs/uptraining.md)."""
BLOCK_SHARE = 4
"""Where speed is asked for, one in so many of the layers that run is a second use."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the two.

    Attributes:
        ratio: weights of the result over the source's, embeddings included; above 0, below 1.
        speed: FLOPs per token of the source over the result's; above 1.
    """

    ratio: float | None = None
    speed: float | None = None

    def __str__(self) -> str:
        if self.ratio is not None:
            return f"at most {self.ratio:.0%} of the weights"
        return f"at most 1/{self.speed:g} of the FLOPs per token"


@dataclass(frozen=True)
class Shape:
    """How many layers go, and how many of those before the gap run twice.

    Attributes:
        name: ``left out`` or ``recursive``.
        leave_out: neighbouring layers that go.
        block: most layers before the gap that run a second time; 0 for ``left out``.
        first_place: fewest layers before the gap.
    """

    name: str
    leave_out: int
    block: int = 0
    first_place: int = 1


def check_goal(goal: Goal) -> None:
    """Refuse a goal that is none.

    Raises:
        MorError: neither or both are given, or one is out of its range.
    """
    if (goal.ratio is None) == (goal.speed is None):
        given = "neither" if goal.ratio is None else "both"
        raise MorError(f"give --ratio (say 0.6) or --speed (say 1.5), one of the two, not {given}")
    if goal.ratio is not None and not 0 < goal.ratio < 1:
        raise MorError(
            f"ratio={goal.ratio:g} must be above 0 and below 1: the result's weights as a share of "
            "the source's"
        )
    if goal.speed is not None and not 1 < goal.speed < math.inf:
        raise MorError(
            f"speed={goal.speed:g} must be above 1: the source's FLOPs per token over the result's"
        )


def find_shapes(config: MoRConfig, goal: Goal, seq_len: int) -> list[Shape]:
    """The shapes that reach the goal with as many layers as it allows.

    Args:
        config: of a vanilla model.
        goal: checked.
        seq_len: tokens of context at which FLOPs are counted.

    Raises:
        MorError: no number of layers reaches the goal.
    """
    layers = config.num_hidden_layers
    if layers < 3:
        raise MorError(f"the source has {layers} layers; at least 3 are needed to leave one out")
    plain = [Shape("left out", gap) for gap in range(1, layers)]
    # The more goes, the sooner it is reached.
    first = bisect_left(plain, True, key=lambda shape: _reaches(config, shape, goal, seq_len))
    if first == len(plain):
        small = folded_config(config, fold_shape(config, plain[-1], 1))
        share = count_parameters(small)[0] / count_parameters(config)[0]
        raise MorError(
            f"{goal} cannot be reached by leaving out layers: one layer, with embedding and head, "
            f"is {share:.0%} of the weights and runs "
            f"{_times_faster(config, small, seq_len):.2f} times as fast; ask for less"
        )
    shapes, stay = [plain[first]], layers - plain[first].leave_out
    for gap in range(plain[first].leave_out, layers - 1):
        if goal.ratio is not None:
            # As many weights: the block is as large as the gap, or as what stands before it.
            again = Shape("recursive", gap, block=gap, first_place=2)
        else:
            # As many layers run: the second uses need no weights, so that more layers go.
            block = max(1, stay // BLOCK_SHARE)
            again = Shape("recursive", gap, block, first_place=block + 1)
        if places(config, again) and _reaches(config, again, goal, seq_len):
            return [*shapes, again]
    return shapes


def _reaches(config: MoRConfig, shape: Shape, goal: Goal, seq_len: int) -> bool:
    """Whether the goal is reached wherever the gap is: the last place has the largest block."""
    small = folded_config(config, fold_shape(config, shape, places(config, shape)[-1]))
    if goal.ratio is not None:
        return count_parameters(small)[0] <= goal.ratio * count_parameters(config)[0]
    assert goal.speed is not None
    return _times_faster(config, small, seq_len) >= goal.speed


def _times_faster(config: MoRConfig, small: MoRConfig, seq_len: int) -> float:
    ours, theirs = flops_per_token(small, seq_len), flops_per_token(config, seq_len)
    return theirs.forward / ours.forward


def places(config: MoRConfig, shape: Shape) -> list[int]:
    """Where the gap of ``shape`` may begin: the number of layers before it."""
    return list(range(shape.first_place, config.num_hidden_layers - shape.leave_out + 1))


def fold_shape(config: MoRConfig, shape: Shape, before: int) -> Folding:
    """The folding of ``shape`` with ``before`` layers before the gap.

    Raises:
        ConfigError: the gap does not fit there.
    """
    if before not in places(config, shape):
        raise ConfigError(f"before={before} must be one of {places(config, shape)}")
    if not shape.block:
        return _left_out(config, shape.leave_out, before)
    block = min(shape.block, before - 1)  # the first layer is the prelude
    return Folding(
        num_recursions=2,
        init="lower",
        num_prelude_layers=before - block,
        num_recursion_layers=block,
        num_coda_layers=config.num_hidden_layers - shape.leave_out - before,
        relaxation="gains",
        norms="own",
        start_gain=START_GAIN,
    )


def _left_out(config: MoRConfig, leave_out: int, before: int) -> Folding:
    return Folding(
        num_recursions=1,
        init="lower",
        num_prelude_layers=0,
        num_recursion_layers=before,
        num_coda_layers=config.num_hidden_layers - leave_out - before,
    )
