from __future__ import annotations

import pytest

from mor.checks import is_on


@pytest.mark.parametrize("text", ["0", "off", "OFF", "false", "no", " 0 "])
def test_a_switch_that_is_off(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOR_SWITCH", text)
    assert not is_on("MOR_SWITCH", True)


@pytest.mark.parametrize("default", [True, False])
def test_a_switch_that_is_on_or_not_set(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("1", "on", "true", "yes"):
        monkeypatch.setenv("MOR_SWITCH", text)
        assert is_on("MOR_SWITCH", default)
    for text in ("", "  "):  # set to nothing
        monkeypatch.setenv("MOR_SWITCH", text)
        assert is_on("MOR_SWITCH", default) is default
    monkeypatch.delenv("MOR_SWITCH")
    assert is_on("MOR_SWITCH", default) is default
