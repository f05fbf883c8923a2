"""Which layers may go: goals are reached with as many layers as they allow."""

from __future__ import annotations

import pytest

from mor.compress.plan import Goal, Shape, check_goal, find_shapes, fold_shape, places
from mor.config import ConfigError, MoRConfig
from mor.errors import MorError
from mor.hf.fold.plan import folded_config, layer_map
from mor.model.flops import count_parameters, flops_per_token

SEQ_LEN = 64


def vanilla(layers: int = 12, vocab_size: int = 100) -> MoRConfig:
    return MoRConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_recursions=1,
        num_prelude_layers=0,
        num_recursion_layers=layers,
        num_coda_layers=0,
        vocab_size=vocab_size,
    )


@pytest.mark.parametrize("layers", [3, 4, 12])
@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_a_ratio_is_kept_wherever_the_gap_is(layers: int, ratio: float) -> None:
    config = vanilla(layers)
    whole = count_parameters(config)[0]
    try:
        shapes = find_shapes(config, Goal(ratio=ratio), SEQ_LEN)
    except MorError:
        assert ratio < 0.6
        assert layers < 5  # one layer and the embedding are more than that
        return
    for shape in shapes:
        for before in places(config, shape)[:: len(places(config, shape)) - 1 or 1]:
            small = folded_config(config, fold_shape(config, shape, before))
            assert count_parameters(small)[0] <= ratio * whole
    # One layer more is too much.
    if shapes[0].leave_out > 1:
        one_more = Shape("left out", shapes[0].leave_out - 1)
        small = folded_config(config, fold_shape(config, one_more, 1))
        assert count_parameters(small)[0] > ratio * whole


@pytest.mark.parametrize("speed", [1.2, 1.5, 2.0])
def test_a_speed_is_kept_and_recursion_has_fewer_weights(speed: float) -> None:
    config = vanilla()
    plain, again = find_shapes(config, Goal(speed=speed), SEQ_LEN)
    theirs = flops_per_token(config, SEQ_LEN).forward
    weights = []
    for shape in (plain, again):
        for before in places(config, shape):
            small = folded_config(config, fold_shape(config, shape, before))
            assert theirs / flops_per_token(small, SEQ_LEN).forward >= speed
        weights.append(count_parameters(small)[0])
    assert weights[1] < weights[0]


def test_the_block_stands_before_the_gap_and_the_rest_is_the_source() -> None:
    config = vanilla(12)
    again = find_shapes(config, Goal(ratio=0.7), SEQ_LEN)[1]
    for before in places(config, again):
        folding = fold_shape(config, again, before)
        where = layer_map(config, folding)
        block = [layer for (layer,) in where["shared_layers"]]
        assert block == list(range(before - len(block), before))
        assert where["stack"][:before] == list(range(before))
        after = config.num_hidden_layers - again.leave_out - before
        assert where["stack"][-after:] == list(range(12 - after, 12)) if after else True
    with pytest.raises(ConfigError, match="before=1 must be one of"):
        fold_shape(config, again, 1)


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        (Goal(), "not neither"),
        (Goal(0.5, 2.0), "not both"),
        (Goal(ratio=0.0), "ratio=0 must be above 0"),
        (Goal(ratio=1.0), "ratio=1 must be above 0"),
        (Goal(ratio=float("nan")), "ratio=nan"),
        (Goal(speed=1.0), "speed=1 must be above 1"),
        (Goal(speed=float("inf")), "speed=inf"),
    ],
)
def test_goals_that_are_none(goal: Goal, said: str) -> None:
    with pytest.raises(MorError, match=said):
        check_goal(goal)


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(
        MorError, match=r"at most 5% of the weights cannot be reached.*ask for less"
    ):
        find_shapes(vanilla(), Goal(ratio=0.05), SEQ_LEN)
    with pytest.raises(MorError, match="the source has 2 layers"):
        find_shapes(vanilla(2), Goal(ratio=0.9), SEQ_LEN)
