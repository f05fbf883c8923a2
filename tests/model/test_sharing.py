"""Sharing, thinning and initialisation maps against the measured table of the authors' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.config import ConfigError, MoRConfig
from mor.model.sharing import recursion_config, source_layers, thinned_layers

TABLE = Path(__file__).parents[1] / "golden" / "init_mapping.json"
ENTRIES: list[dict[str, Any]] = json.loads(TABLE.read_text("utf-8"))
SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
INITIALIZATIONS = ("stepwise", "average", "lower", "upper", "random")


def label(entry: dict[str, Any]) -> str:
    fields = ("source_layers", "num_recursion", "sharing", "init", "base_depth_arg")
    return "-".join(str(entry[name]) for name in fields)


def unrolled(entry: dict[str, Any], rng: np.random.Generator | None = None) -> list[Any]:
    """Source layers of each unrolled layer of the entry's model, private ones included."""
    layers, recursions, sharing = (
        entry[name] for name in ("source_layers", "num_recursion", "sharing")
    )
    block = source_layers(
        layers, recursions, sharing, entry["init"], rng, base_depth=entry["base_depth_arg"]
    )
    middle = sharing.startswith("middle_")
    groups = [(0,), *block, (layers - 1,)] if middle else block
    return [groups[i] for i in entry["shared_group_of_each_unrolled_layer"]]


def fingerprint(layers: tuple[int, ...], num_layers: int) -> list[int] | None:
    """What the measurement behind the table reads off a mean of layers whose weights are 2^index.

    The smallest count whose multiple of the mean is a whole number with that many binary ones. In
    float32 a mean over layers far apart, or a third of a large power, is rounded: two entries of
    the table (32-3-middle_sequence, 34-4-middle_cycle) hold what the rounded means decode to.
    """
    total = sum(np.float32(2.0**layer) for layer in layers)
    mean = float(np.float32(total) / np.float32(len(layers)))
    for count in range(1, num_layers + 1):
        whole = round(mean * count)
        if abs(mean * count - whole) < 1e-3 and whole.bit_count() == count:
            return [bit for bit in range(num_layers) if whole >> bit & 1]
    return None


@pytest.mark.parametrize("entry", ENTRIES, ids=label)
def test_every_entry_of_the_table_is_reproduced(entry: dict[str, Any]) -> None:
    sources, measured = unrolled(entry), entry["source_layer_of_each_unrolled_layer"]
    num_layers = entry["source_layers"]
    if entry["init"] == "average":
        assert [fingerprint(layers, num_layers) for layers in sources] == measured
    elif entry["init"] == "random":
        # Drawn from an unseeded generator: the table shows the shape, not the values.
        groups = entry["shared_group_of_each_unrolled_layer"]
        middle = entry["sharing"].startswith("middle_")
        assert [len(layers) for layers in sources] == [1] * len(measured)
        for drawn in ([layers[0] for layers in sources], measured):
            chosen = [drawn[groups.index(g)] for g in range(max(groups) + 1)]
            assert [chosen[g] for g in groups] == drawn
            assert chosen == sorted(set(chosen))
            shared = chosen[1:-1] if middle else chosen
            assert all(middle <= layer < num_layers - middle for layer in shared)
    else:
        assert sources == [(layer,) for layer in measured]


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e["base_depth_arg"] is None], ids=label)
def test_layer_counts_and_sharing_groups_are_the_table_s(entry: dict[str, Any]) -> None:
    layers, recursions, sharing = (
        entry[name] for name in ("source_layers", "num_recursion", "sharing")
    )
    kept = thinned_layers(layers, recursions, sharing)
    assert len(kept) == entry["layers_after"] == entry["num_hidden_layers_after"]
    fields = recursion_config(len(kept), recursions, sharing)
    config = MoRConfig(**fields)
    assert config.num_hidden_layers == entry["layers_after"]
    prelude = config.num_prelude_layers
    last = prelude + config.num_recursion_layers
    uses = range(recursions * config.num_recursion_layers)
    shared = [prelude + config.shared_layer(i) for i in uses]
    assert [*range(prelude), *shared, *range(last, last + config.num_coda_layers)] == (
        entry["shared_group_of_each_unrolled_layer"]
    )


def test_the_paper_s_own_example() -> None:
    sources = source_layers(32, 3, "middle_cycle", "stepwise")
    assert [layers[0] for layers in sources] == [1, 4, 7, 11, 14, 17, 20, 24, 27, 30]


stacks = st.tuples(
    st.integers(1, 60),
    st.integers(1, 6),
    st.sampled_from(SHARINGS),
    st.integers(0, 3),
    st.integers(0, 3),
)


@given(stack=stacks, initialization=st.sampled_from(INITIALIZATIONS), seed=st.integers(0, 99))
def test_any_stack_thins_and_maps_within_its_shared_part(
    stack: tuple[int, int, Any, int, int], initialization: Any, seed: int
) -> None:
    layers, recursions, sharing, prelude, coda = stack
    if not sharing.startswith("middle_"):
        prelude = coda = 0
    sides = {"num_prelude_layers": prelude, "num_coda_layers": coda}
    shared = layers - prelude - coda
    if shared < recursions:
        with pytest.raises(ConfigError, match=f"num_layers={layers}"):
            thinned_layers(layers, recursions, sharing, prelude, coda)
        return
    kept = thinned_layers(layers, recursions, sharing, prelude, coda)
    middle = kept[prelude : len(kept) - coda]
    assert kept == sorted(set(kept))
    assert kept[:prelude] == list(range(prelude))
    assert kept[len(kept) - coda :] == list(range(layers - coda, layers))
    assert len(middle) == shared // recursions * recursions
    assert middle[0] == prelude
    assert middle[-1] == layers - coda - 1 or len(middle) == 1

    rng = np.random.default_rng(seed)
    sources = source_layers(layers, recursions, sharing, initialization, rng, **sides)
    assert len(sources) == len(middle) // recursions
    flat = [layer for group in sources for layer in group]
    assert set(flat) <= set(middle)
    assert len(flat) == len(set(flat))
    if initialization == "average":
        # Every layer that stays is used exactly once, by the shared layer that will serve it.
        config = MoRConfig(**recursion_config(len(kept), recursions, sharing, **sides))
        for place, layer in enumerate(middle):
            assert layer in sources[config.shared_layer(place)]
    else:
        assert flat == sorted(flat)


@given(seed=st.integers(0, 1000))
def test_random_draws_depend_on_the_generator_alone(seed: int) -> None:
    def drawn() -> list[tuple[int, ...]]:
        return source_layers(32, 3, "middle_cycle", "random", np.random.default_rng(seed))

    assert drawn() == drawn()


def test_random_without_a_generator_is_not_seeded() -> None:
    draws = {tuple(source_layers(200, 2, "cycle", "random")) for _ in range(3)}
    assert len(draws) > 1


def test_a_count_that_does_not_divide_names_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError, match=r"num_layers=32 .*num_recursions=4 .* 30 and 34"):
        recursion_config(32, 4, "middle_cycle")
    with pytest.warns(UserWarning, match="thinned to 30 layers"):
        fields = recursion_config(32, 4, "middle_cycle", thin=True)
    assert fields == {
        "num_recursions": 4,
        "num_prelude_layers": 1,
        "num_recursion_layers": 7,
        "num_coda_layers": 1,
        "sharing": "middle_cycle",
    }


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: thinned_layers(4, 3, "middle_cycle"), "at least 5 layers"),
        (lambda: thinned_layers(4, 0, "cycle"), "num_recursions=0"),
        (lambda: thinned_layers(6, 3, "spiral"), "sharing='spiral'"),
        (lambda: thinned_layers(6, 3, "cycle", 1, 0), "num_prelude_layers=1"),
        (lambda: thinned_layers(9, 3, "middle_cycle", -1, 1), "num_prelude_layers=-1"),
        (lambda: source_layers(6, 3, "cycle", "best"), "initialization='best'"),
        (lambda: source_layers(6, 1, "cycle", "lower", base_depth=4), r"base_depth=4 .*\[1, 2, 3"),
        (lambda: source_layers(6, 3, "cycle", "lower", base_depth=2), "num_recursions=1"),
        (lambda: source_layers(6, 1, "middle_cycle", "lower", base_depth=2), "sharing='cycle'"),
    ],
)
def test_what_does_not_fit_is_named(call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


@given(st.data())
def test_a_small_block_keeps_its_own_places_whole(data: st.DataObject) -> None:
    """As the first use or the last, in ascending order, the rest spread up to the coda."""
    layers, recursions = data.draw(st.integers(4, 60)), data.draw(st.integers(1, 4))
    prelude = data.draw(st.integers(0, layers - recursions))
    coda = data.draw(st.integers(0, layers - recursions - prelude))
    block = data.draw(st.integers(1, (layers - prelude - coda) // recursions))
    sides = (prelude, coda, block)
    for init in ("lower", "upper", "stepwise"):
        kept = thinned_layers(layers, recursions, "middle_cycle", *sides, init)  # type: ignore[arg-type]
        assert kept == sorted(set(kept))
        assert len(kept) == prelude + block * recursions + coda
        assert kept[:prelude] == list(range(prelude))
        assert kept[len(kept) - coda :] == list(range(layers - coda, layers))
        middle, end = kept[prelude : len(kept) - coda], layers - coda
        if init == "lower":
            assert middle[:block] == list(range(prelude, prelude + block))
            assert recursions == 1 or middle[-1] == end - 1
        elif init == "upper":
            assert middle[-block:] == list(range(end - block, end))
        assert recursion_config(
            layers,
            recursions,
            num_prelude_layers=prelude,
            num_coda_layers=coda,
            num_recursion_layers=block,
        ) == {
            "num_recursions": recursions,
            "num_prelude_layers": prelude,
            "num_recursion_layers": block,
            "num_coda_layers": coda,
            "sharing": "middle_cycle",
        }
