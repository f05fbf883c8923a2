"""Reading documents from files and folders."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mor.data import Document, iter_documents
from mor.data.documents import decode_text
from mor.data.files import documents_of
from mor.errors import MorError


def test_folder_is_read_recursively_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "deep" / "two.MD").write_text("two")
    (tmp_path / "z.txt").write_text("last")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n  \n{"text": "second"}')
    (tmp_path / "picture.png").write_bytes(b"\xff\xff")
    (tmp_path / ".hidden" / "secret.txt").write_text("no")
    (tmp_path / ".secret.txt").write_text("no")
    assert list(iter_documents(tmp_path)) == [
        Document("a.jsonl:1", "first"),
        Document("a.jsonl:4", "second"),
        Document("b/deep/two.MD", "two"),
        Document("z.txt", "last"),
    ]


def test_names_do_not_change_with_the_place_of_the_folder(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "x").mkdir(parents=True)
        (tmp_path / place / "x" / "y.txt").write_text("text")
    assert list(iter_documents(tmp_path / "here")) == list(iter_documents(tmp_path / "there"))
    assert [d.name for d in iter_documents(tmp_path / "here" / "x" / "y.txt")] == ["y.txt"]


def test_folder_named_like_a_corpus_can_be_written_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "mine.txt").write_text("my own")
    monkeypatch.chdir(tmp_path)
    assert list(iter_documents("./shakespeare")) == [Document("mine.txt", "my own")]


def test_text_files_lose_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert next(iter_documents(tmp_path)).text == "one\ntwo\nthree\n"


@given(st.text())
def test_json_lines_keep_the_text_exactly(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    file.write_text(json.dumps({"body": text}) + "\n", encoding="utf-8")
    assert [d.text for d in iter_documents(file, text_field="body")] == [text]


@pytest.mark.parametrize("article", ["THE", "THIS"])
def test_gutenberg_licence_is_left_out(article: str) -> None:
    marker = f"{article} PROJECT GUTENBERG EBOOK A PLAY,\nIN TWO ACTS"
    book = f"Licence\n*** START OF {marker} ***\n\nAct 1\nAct 2\n\n*** END OF {marker} ***\nMore"
    assert decode_text(book.encode(), "book") == "Act 1\nAct 2\n"


def test_one_gutenberg_marker_alone_changes_nothing() -> None:
    text = "He wrote\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\nand stopped.\n"
    assert decode_text(text.encode(), "book") == text


@given(prefix=st.text(max_size=20), suffix=st.binary(max_size=5), mark=st.booleans())
def test_bad_utf8_names_file_and_offset(prefix: str, suffix: bytes, mark: bool) -> None:
    good = (b"\xef\xbb\xbf" if mark else b"") + prefix.encode()
    with pytest.raises(
        MorError, match=rf"^notes\.txt is not UTF-8: byte 0xff at offset {len(good)} "
    ):
        decode_text(good + b"\xff" + suffix, "notes.txt")


def test_bad_utf8_in_json_lines_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    first = '{"text": "é"}\n'.encode()
    (tmp_path / "a.jsonl").write_bytes(first + b'{"text": "\xfe"}\n')
    with pytest.raises(MorError, match=rf"a\.jsonl is not UTF-8: .* offset {len(first) + 10} "):
        list(iter_documents(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2 is not valid JSON"),
        ("[" * 100_000, r"a\.jsonl:2 is not valid JSON"),
        ('["text"]', r"a\.jsonl:2 holds a JSON list, expected an object"),
        ('{"id": 1, "body": "x"}', r"a\.jsonl:2 has no field 'text'; its fields: 'id', 'body'"),
        ("{}", r"a\.jsonl:2 has no field 'text'; its fields: none"),
        ('{"text": 3}', r"a\.jsonl:2: field 'text' is int, expected a string"),
        (r'{"text": "\ud800"}', r"a\.jsonl:2: field 'text' is not valid Unicode"),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(MorError, match=message):
        list(iter_documents(tmp_path))


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"source .*nothing does not exist: expected shakespeare, a"):
        list(iter_documents(tmp_path / "nothing"))


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(MorError, match=r"suffix '\.pdf', expected \.txt, \.md, "):
        list(iter_documents(tmp_path / "a.pdf"))


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(MorError, match=r"no file of text in the folder .*: expected \.txt, \.md,"):
        list(iter_documents(tmp_path))


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    with pytest.raises(MorError, match=r"cannot read .*link\.txt: No such file"):
        list(iter_documents(tmp_path))


def test_an_array_is_read_as_its_objects(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": ""}, {"text": "th\u00e9e", "id": 3}]
    written = "\ufeff \n" + json.dumps(rows, indent=2)
    (tmp_path / "a.json").write_text(written, encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "config.json").write_text(json.dumps({"text": "no document"}))
    found = list(iter_documents(tmp_path))
    assert [document.name for document in found] == [
        f"{name}:{number}" for name in ("a.json", "b.json.gz") for number in (1, 2, 3)
    ]
    assert [document.text for document in found] == ["one", "", "th\u00e9e"] * 2
    assert list(documents_of(tmp_path / "a.json", "a", "text", skip=2)) == [
        Document("a:3", "th\u00e9e")
    ]


def test_json_by_its_own_name_may_hold_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [document.text for document in iter_documents(tmp_path / "a.json")] == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": ', r"a\.json is not valid JSON"),
        (b"[" * 100_000, r"a\.json is not valid JSON"),
        (b'["a"]', r"a\.json:1 holds a JSON str, expected an object"),
        (b'[{"text": "a"}, {"body": "a"}]', r"a\.json:2 has no field 'text'; its fields: 'body'"),
        (b'[{"text": "\xff"}]', r"a\.json is not UTF-8: byte 0xff at offset 11"),
        (b'{\n "text": "a"\n}', r"a\.json:1 is not valid JSON"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(MorError, match=message):
        list(iter_documents(tmp_path / "a.json"))
