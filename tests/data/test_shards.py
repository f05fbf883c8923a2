"""Token shards: what goes in comes out, and damage is named."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data import ShardInfo, ShardWriter, TokenShard
from mor.data.shards import HEADER_BYTES, token_dtype
from mor.errors import MorError


def write(path: Path, documents: list[list[int]], vocab_size: int = 100) -> ShardInfo:
    with ShardWriter(path, vocab_size) as writer:
        for number, tokens in enumerate(documents):
            writer.append(f"document {number}", tokens, 3 * len(tokens))
    assert writer.info is not None
    return writer.info


@st.composite
def vocabularies_and_documents(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    vocab_size = draw(st.sampled_from([1, 2, 255, 256, 4096, 65_535, 65_536, 65_537, 2**31]))
    ids = st.one_of(st.integers(0, vocab_size - 1), st.just(vocab_size - 1))
    return vocab_size, draw(st.lists(st.lists(ids, max_size=8), max_size=6))


@given(vocabularies_and_documents())
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[int, list[list[int]]]
) -> None:
    vocab_size, documents = case
    path = tmp_path_factory.mktemp("shard") / "train-00000.bin"
    info = write(path, documents, vocab_size)
    total = sum(map(len, documents))
    assert info == ShardInfo(path.name, total, len(documents), 3 * total, info.sha256)

    shard = TokenShard(path)
    assert [shard.document(i).tolist() for i in range(len(documents))] == documents
    assert shard.names == [f"document {i}" for i in range(len(documents))]
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    assert shard.tokens.dtype == token_dtype(vocab_size)
    assert shard.starts.tolist() == [0, *np.cumsum([len(d) for d in documents], dtype=int)]
    assert (shard.num_tokens, shard.num_documents) == (total, len(documents))
    assert (shard.num_bytes, shard.vocab_size) == (3 * total, vocab_size)
    shard.verify(info.sha256)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(4096, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_smallest_type_that_fits(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


@given(names=st.lists(st.text(), max_size=4))
def test_any_name(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    with ShardWriter(path, 10) as writer:
        for name in names:
            writer.append(name, [1], 1)
    assert TokenShard(path).names == names


def test_pickles_as_its_path(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [list(range(100)) * 100])
    shard = TokenShard(tmp_path / "a.bin")
    pickled = pickle.dumps(shard)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).tokens, shard.tokens)


def test_tokens_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [[1, 2]])
    with pytest.raises(ValueError, match="read-only"):
        TokenShard(tmp_path / "a.bin").tokens[0] = 3


@pytest.mark.parametrize("token", [-1, 100, 2**40])
def test_token_out_of_range_leaves_nothing_behind(tmp_path: Path, token: int) -> None:
    with pytest.raises(MorError, match=rf"document 1 has token id {token}, expected 0 to 99"):
        write(tmp_path / "a.bin", [[1], [5, token]])
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_keeps_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", [[1, 2]])
    before = (tmp_path / "a.bin").read_bytes()

    def write_and_stop() -> None:
        with ShardWriter(tmp_path / "a.bin", 10) as writer:
            writer.append("x", [3], 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == before


def with_header(data: bytes, at: int, value: bytes) -> bytes:
    """`data` with a header field changed and the header's checksum made right again."""
    header = bytearray(data[:HEADER_BYTES])
    header[at : at + len(value)] = value
    header[60:64] = struct.pack("<I", zlib.crc32(header[:56]))
    return bytes(header) + data[HEADER_BYTES:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: b"", r"is not a token shard: it starts with b''"),
        (lambda d: b"GGUF" + d[4:], r"is not a token shard: it starts with b'GGUFOKEN'"),
        (lambda d: d[:20], r"is cut short: its header is incomplete"),
        (lambda d: d[:-1], r"is cut short: \d+ bytes, expected \d+"),
        (lambda d: d[:HEADER_BYTES], r"is cut short: 64 bytes, expected \d+"),
        (lambda d: d + b"\0", r"is too long: \d+ bytes, expected \d+"),
        (lambda d: with_header(d, 8, b"\7"), r"has version 7, this program reads 1"),
        (lambda d: with_header(d, 12, b"\3"), r"is damaged: its header fails its checksum"),
        (lambda d: d[:24] + b"\1" + d[25:], r"is damaged: its header fails its checksum"),
        (lambda d: d[:80] + b"\1" + d[81:], r"is damaged: its document boundaries"),
    ],
)
def test_damage_found_on_opening(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "train-00007.bin"
    write(path, [[1, 2, 3], [4, 5]])  # 10 bytes of tokens, so the boundaries begin at byte 80
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MorError, match=rf"train-00007\.bin {message}"):
        TokenShard(path)


@given(data=st.data())
def test_any_changed_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("shard") / "train-00003.bin"
    info = write(path, [[1, 2, 3], [4, 5]])
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(MorError, match=r"train-00003\.bin"):
        TokenShard(path).verify(info.sha256)


def test_unreadable_names(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write(path, [[1], [2]])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(MorError, match=r"a\.bin is damaged: names unreadable"):
        _ = TokenShard(path).names
    path.write_bytes(content.replace(b'"document 0", "document 1"', b'"document 0----document 1"'))
    with pytest.raises(MorError, match=r"a\.bin is damaged: expected 2 names"):
        _ = TokenShard(path).names


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"cannot read shard .*gone\.bin: No such file"):
        TokenShard(tmp_path / "gone.bin")
