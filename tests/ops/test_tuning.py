"""How products are cut is measured once and kept; no choice moves a bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mor.errors import MorError
from mor.ops import native
from mor.ops.native import PackedLinear, Workspace, packed
from mor.ops.native.tuning import CANDIDATES, VARIABLE, Tuning, parse_tuning, tune

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, and afterwards the choice of this process again."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("mor.ops.native.tuning.library_file", lambda: tmp_path / "kernels.so")
    monkeypatch.setattr("mor.ops.native.tuning._SECONDS", 0)
    yield tmp_path
    packed.choose_tuning().apply()


def test_the_fastest_is_measured_once_and_kept(kept: Path) -> None:
    asked = []

    def measure(candidate: Tuning) -> float:
        asked.append(candidate)
        return 1.0 if candidate == CANDIDATES[3] else 2.0

    assert tune(measure) == CANDIDATES[3]
    assert asked == list(CANDIDATES)
    assert tune(measure) == CANDIDATES[3]
    assert len(asked) == len(CANDIDATES)
    (file,) = kept.iterdir()
    assert json.loads(file.read_text())["rows_kib"] == CANDIDATES[3].rows_kib
    broken = (
        *("half a li", "[1]", '{"rows_kib": Infinity, "fetch": true}'),
        *('{"rows_kib": 0, "fetch": true}', '{"rows_kib": 1e99, "fetch": true}'),
        *('{"rows_kib": 99999999999, "fetch": true}', '{"rows_kib": 256, "fetch": "false"}'),
    )
    for count, text in enumerate(broken, 2):
        file.write_text(text)  # what is kept may be broken: it is measured again
        assert tune(measure) == CANDIDATES[3]
        assert len(asked) == count * len(CANDIDATES)


def test_a_little_faster_is_noise(kept: Path) -> None:
    assert tune(lambda c: 1.0 if c == CANDIDATES[0] else 0.99) == CANDIDATES[0]


def test_the_environment_decides(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Tuning) -> float:
        raise AssertionError("measured")

    monkeypatch.setenv(VARIABLE, "off")
    assert tune(never) == Tuning()
    monkeypatch.setenv(VARIABLE, "rows_kib=100,fetch=0")
    assert tune(never) == Tuning(100, fetch=False)
    assert not list(kept.iterdir())
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(MorError, match="MOR_NATIVE_TUNING='fast' must be auto, off"):
        tune(never)
    many = f"rows_kib={10**20}"  # more bytes than a number of 64 bits says
    for wrong in ("rows_kib=0", "rows_kib=-1", many, "fetch=2", "rows_kib=1,more=2"):
        with pytest.raises(MorError, match="rows_kib=N"):
            parse_tuning(wrong)


@pytest.mark.parametrize("int8", [False, True])
def test_no_choice_moves_a_bit(kept: Path, int8: bool) -> None:
    linear = PackedLinear([torch.randn(100, 300)], [None], int8=int8)
    x, work, found = torch.randn(70, 300), Workspace(), []
    for candidate in (*CANDIDATES, Tuning(rows_kib=1)):
        candidate.apply()
        found.append(linear(x, work))
    for one in found[1:]:
        assert torch.equal(one, found[0])


def test_a_choice_is_made_when_weights_are_packed() -> None:
    PackedLinear([torch.randn(3, 4)], [None])
    assert packed.choose_tuning.cache_info().currsize == 1
