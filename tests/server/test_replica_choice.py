"""Which replica a request goes to, how many there are, and whether they have one model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mor.cli.app import app
from mor.errors import MorError
from mor.run_files import SHIPPED
from mor.server.ray import app as builder
from mor.server.ray.counts import (
    RAY_DEFAULTS,
    Count,
    Share,
    parse_count,
    set_ray_defaults,
    share_memory,
    share_out,
)
from mor.server.ray.fingerprint import check_fingerprint, fingerprint
from mor.server.ray.prefixes import BLOCK, MOST_BLOCKS, PrefixTable, blocks_of
from mor.server.ray.settings import read_settings


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "tiny", **fields}).encode()


# Beginnings ---------------------------------------------------------------------------------------


@given(st.text(max_size=600), st.text(max_size=300), st.text(max_size=300))
def test_prompts_that_begin_alike_have_hashes_that_begin_alike(
    same: str, one: str, other: str
) -> None:
    first, second = blocks_of(body(prompt=same + one)), blocks_of(body(prompt=same + other))
    alike = len(same.encode()) // BLOCK
    assert first[:alike] == second[:alike]
    assert len(first) == min(MOST_BLOCKS, len((same + one).encode()) // BLOCK)
    if (same + one).encode()[: BLOCK * 4] != (same + other).encode()[: BLOCK * 4]:
        assert first[:4] != second[:4] or len(first) < 4 or len(second) < 4


def test_a_conversation_grows_at_its_end() -> None:
    turns = [{"role": "system", "content": "Be brief. " * 20}]
    before: tuple[int, ...] = ()
    for turn in range(4):
        turns += [{"role": "user", "content": f"question {turn} " * 10}]
        blocks = blocks_of(body(messages=turns))
        assert len(blocks) > len(before)
        assert blocks[: len(before)] == before
        turns += [{"role": "assistant", "content": f"answer {turn}"}]
        before = blocks
    assert blocks_of(body(messages=turns, tools=[{"name": "f"}]))[:3] != before[:3]


@pytest.mark.parametrize(
    "wrong", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"messages": 3}', b"1" * 9000]
)
def test_what_is_no_request_has_no_beginning(wrong: bytes) -> None:
    assert blocks_of(wrong) == ()


def test_of_several_prompts_the_first_counts_and_tokens_are_a_prompt() -> None:
    text = "the king " * 40
    assert blocks_of(body(prompt=[text, "other"])) == blocks_of(body(prompt=text)) != ()
    ids = list(range(200))
    assert blocks_of(body(prompt=[ids])) == blocks_of(body(prompt=ids)) != ()
    assert len(blocks_of(body(prompt="x" * 4_000_000))) == MOST_BLOCKS


# Choice -------------------------------------------------------------------------------------------


def test_a_request_goes_where_its_pages_are_until_that_one_is_too_busy() -> None:
    table = PrefixTable(slack=2)
    blocks = (1, 2, 3, 4)
    table.record(blocks[:2], "b")
    table.record(blocks, "c")
    assert table.rank(blocks, {"a": 0, "b": 0, "c": 2}) == ["c", "b", "a"]
    assert table.rank(blocks, {"a": 0, "b": 1, "c": 3}) == ["b", "a", "c"]
    assert table.rank((9,), {"a": 2, "b": 1, "c": 0}) == ["c", "b", "a"]
    table.forget("c")
    assert table.match(blocks, "c") == 0
    assert table.rank(blocks, {"a": 0, "b": 0, "c": 0})[0] == "b"
    assert table.rank(blocks, {}) == []


def test_routers_that_know_nothing_agree_and_spread() -> None:
    loads = dict.fromkeys("abc", 0)
    firsts = [PrefixTable().rank((key,), loads)[0] for key in range(300)]
    assert firsts == [PrefixTable().rank((key,), loads)[0] for key in range(300)]
    assert all(firsts.count(name) > 60 for name in loads)


def test_a_table_forgets_what_was_not_used_for_longest() -> None:
    table = PrefixTable(most=3)
    table.record((1, 2), "a")
    table.record((3,), "a")
    table.record((1,), "a")
    table.record((4,), "a")
    assert [table.match((block,), "a") for block in (1, 2, 3, 4)] == [1, 0, 1, 1]


# How many -----------------------------------------------------------------------------------------


def test_counts() -> None:
    assert parse_count(None, None) is None
    assert parse_count(3, None) == Count(3, 3, 3)
    assert parse_count(None, "1:4") == Count(1, 1, 4)
    assert parse_count(2, "1:4") == Count(1, 2, 4)
    assert share_out(Count(2, 2, 2), 8, 0) == Share(4)
    assert share_out(Count(1, 1, 3), 8, 0) == Share(2)
    assert share_out(Count(2, 2, 2), 8, 2) == Share(4, 1)


@pytest.mark.parametrize(
    ("replicas", "autoscale", "told"),
    [
        (0, None, "replicas=0 must be at least 1"),
        (-1, None, "replicas=-1"),
        (None, "4", "autoscale='4' must be MIN:MAX"),
        (None, "1:x", "MIN:MAX"),
        (None, "-1:2", "MIN:MAX"),
        (None, "1:2:3", "MIN:MAX"),
        (None, "", "MIN:MAX"),
        (None, "0:2", "MIN must be at least 1"),
        (None, "3:2", "MAX at least MIN"),
        (5, "1:4", "replicas=5 is outside of autoscale='1:4'"),
    ],
)
def test_wrong_counts(replicas: int | None, autoscale: str | None, told: str) -> None:
    with pytest.raises(MorError, match=told):
        parse_count(replicas, autoscale)


def test_more_replicas_than_the_machine_has_cores_or_gpus() -> None:
    with pytest.raises(MorError, match="has 2 cores, and each replica has at least one"):
        share_out(Count(1, 1, 3), 2, 0)
    with pytest.raises(MorError, match="1 GPUs, and each replica has one"):
        share_out(Count(2, 2, 2), 8, 1)


def test_replicas_of_one_machine_share_its_memory() -> None:
    options = {"memory_fraction": 0.6, "num_pages": None}
    assert share_memory(options, Count(2, 2, 2))["memory_fraction"] == pytest.approx(0.3)
    assert share_memory(options | {"num_pages": 9}, Count(2, 2, 2))["memory_fraction"] == 0.6


# One model ----------------------------------------------------------------------------------------


def test_a_folder_that_changed_is_another_model(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED / "prose", tmp_path / "model"))
    expected = fingerprint(SHIPPED / "prose")
    check_fingerprint(folder, expected, "replica x")
    (folder / "notes.md").write_text("of no account")
    check_fingerprint(folder, expected, "replica x")
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(MorError, match=r"replica x: the model in .* is not the one"):
        check_fingerprint(folder, expected, "replica x")
    weights.write_bytes(bytes(content[:-1]) + bytes([content[-1] ^ 1]))
    check_fingerprint(folder, expected, "replica x")
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(MorError, match="is not the one"):
        check_fingerprint(folder, expected, "replica x")
    with pytest.raises(MorError, match=r"replica x: model folder .* does not exist"):
        check_fingerprint(tmp_path / "nowhere", expected, "replica x")


# Arguments of the application ---------------------------------------------------------------------


def test_arguments_come_as_texts_or_values() -> None:
    settings = read_settings({"model": "prose", "replicas": "2", "cores": "4", "max_waiting": 7})
    assert (settings.count(), settings.share()) == (Count(2, 2, 2), Share(4))
    assert settings.served().max_waiting == 7
    assert read_settings({}).count() == Count(1, 1, 1)
    read_settings({"model": "prose"}).served().check()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"replica": 2}, "did you mean replicas?"),
        ({"zzz": 2}, "zzz is no argument"),
        ({"cores": 0}, "cores=0"),
        ({"replicas": "two"}, "replicas='two'"),
        ({"fronts": 0}, "fronts=0"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], told: str) -> None:
    with pytest.raises(MorError) as caught:
        read_settings(args)
    assert told in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("application", "deploy", "launch", "router"):
        monkeypatch.delitem(sys.modules, f"mor.server.ray.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")  # which the command sets
    done = CliRunner().invoke(app, ["serve", "prose", "--port", "0", "--replicas", "1"])
    assert isinstance(done.exception, MorError), done.output
    assert str(done.exception).startswith("mor serve --replicas needs the package ray")
    with pytest.raises(MorError, match=r"the package ray.*'\.\[ray\]'"):
        builder({})


def test_ray_settings_of_a_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RAY_DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "2")
    set_ray_defaults()
    found = {name: os.environ[name] for name in RAY_DEFAULTS}
    assert found == RAY_DEFAULTS | {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "2"}
