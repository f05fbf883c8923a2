from __future__ import annotations

import pytest

from mor.bench.specs import default_systems, parse_spec
from mor.errors import MorError


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("mor", None),
        ("vanilla@10", None),
        ("mor1", "vanilla has one recursion"),
        ("nowhere", "is not known; write vanilla"),
        ("mor3:slow", "option 'slow'"),
    ],
)
def test_words_for_systems(word: str, match: str | None) -> None:
    if match is None:
        assert parse_spec(word).kind == "shape"
        return
    with pytest.raises(MorError, match=match):
        parse_spec(word)


def test_options_reach_the_engine() -> None:
    spec = parse_spec("mor3:no_refill,min_gather=16,memory_fraction=0.25")
    wanted = {"policy": "no_refill", "min_gather": 16, "memory_fraction": 0.25}
    assert dict(spec.options) == wanted


def test_the_default_systems_have_a_vanilla_of_every_depth() -> None:
    assert default_systems("360m", (3, 4))[:4] == ["vanilla", "vanilla@34", "mor3", "mor4"]
    assert default_systems("135m", (3,))[:2] == ["vanilla", "mor3"]
    both = default_systems("135m", (3,), int8=True)
    assert both[2:4] == ["vanilla:int8", "mor3:int8"]
    assert "openvino:int8" in both
    assert dict(parse_spec("mor3:int8").options) == {"quantization": "int8"}
