"""The `english` corpus: each reader on a small archive made here; on request, the real packages."""

from __future__ import annotations

import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mor.data import english, iter_documents, prepare
from mor.data.documents import Document
from mor.data.english.archives import read_members
from mor.data.english.dedupe import RUN, drop_copies, sample_runs
from mor.data.english.rdata import read_rda, read_rdb
from mor.data.english.readers import (
    read_austen,
    read_brown,
    read_essays,
    read_glosses,
    read_html,
    read_tidytext,
    untag,
)
from mor.data.packages import fetch_deb, fetch_npm
from mor.errors import MorError
from tests.data.english_parts import (
    AUSTEN,
    BOOKS,
    BROWN,
    ESSAYS,
    HEADER,
    NIL,
    TIDY,
    WORDNET,
    deb,
    pairs,
    rda,
    rdb,
    strings,
    tagged,
    tar,
)


def test_novels_are_paragraphs_of_one_line(tmp_path: Path) -> None:
    assert pairs(read_austen(deb(tmp_path / "a_1_all.deb", AUSTEN))) == [
        ("novels/austen-emma", "EMMA\n\nEmma Woodhouse, handsome, clever, and rich\n\nNext.\n"),
        ("novels/austen-persuasion", "PERSUASION\n\nSir Walter.\n"),
    ]
    assert pairs(read_tidytext(deb(tmp_path / "b_1_all.deb", TIDY))) == [
        ("novels/the-war-of-the-worlds", "No one would have believed\n"),
        ("novels/great-expectations", "My father's name\n"),
    ]


def test_brown_is_spaced_as_print_is(tmp_path: Path) -> None:
    path = tmp_path / "b-1.tgz"
    path.write_bytes(tar(BROWN, "w:gz"))
    text = 'The jury said "no". It ended;\n\nSo (they) say 1/, or not?\n'
    assert pairs(read_brown(path)) == [("brown/ca01", text)]


def test_essays_without_lists_of_links(tmp_path: Path) -> None:
    assert pairs(read_essays(deb(tmp_path / "e_1_all.deb", ESSAYS))) == [
        ("essays/secA1", "A & B\n\nOne two three.\n\nFour\n"),
        ("essays/append1", "Last\n"),
    ]


def test_glosses_are_words_and_their_meaning(tmp_path: Path) -> None:
    assert pairs(read_glosses(deb(tmp_path / "w_1_all.deb", WORDNET))) == [
        ("glosses/adj-00-000", 'able: having means; "able to"\n'),
        ("glosses/verb-29-000", "breathe, take a breath: draw air\n"),
    ]


def test_glosses_fill_documents_of_a_hundred(tmp_path: Path) -> None:
    lines = "".join(f"{n:08d} 29 v 01 word{n} 0 000 | gloss {n}\n" for n in range(101))
    path = deb(tmp_path / "w_1_all.deb", {"./usr/share/wordnet/data.verb": lines.encode()})
    sizes = [document.text.count(":") for document in read_glosses(path)]
    assert sizes == [100, 1]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("``/`` ?/. ''/''", '"?"\n'),
        ("AAb//nn", "AAb/\n"),
        ("a/at ,/, ,/, b/nn", "a,, b\n"),  # only ends of clauses are written twice
        ("", "\n"),
    ],
)
def test_untag(text: str, plain: str) -> None:
    assert untag(text) == plain


def test_html_that_ends_early_keeps_its_text() -> None:
    assert read_html("<p>One<p>Two &lt") == "One\n\nTwo <\n"


def test_r_values() -> None:
    assert read_rda(rda("books", BOOKS), "x")["books"]["title"][2] == "Great Expectations"
    real = struct.pack(">iid", 14, 1, 2.5)
    twice = tagged("a", real) + struct.pack(">ii", 0x402, 0x1FF) + real + NIL  # a symbol again
    assert read_rda(b"RDX2\n" + HEADER + twice, "x") == {"a": [2.5]}
    assert read_rdb(rdb(strings(["é", None])), "x") == [["é", None]]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_rda(b"BZh9", "x.rda"), r"x\.rda is no file of R's data"),
        (lambda: read_rda(rda("b", strings(["ab"]))[:-9], "x.rda"), r"x\.rda is cut short"),
        (lambda: read_rda(rda("f", struct.pack(">ii", 3, 0)), "x.rda"), r"R's kind 3, expected"),
        (lambda: read_rdb(b"\0\0\0\1zz", "x.rdb"), r"x\.rdb is no database"),
        (lambda: read_rdb(rdb(strings(["ab"]))[:-3], "x.rdb"), r"x\.rdb is cut short"),
    ],
)
def test_broken_r_data_is_named(read: Callable[[], object], message: str) -> None:
    with pytest.raises(MorError, match=message):
        read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-40], r"y_1\.deb: it is cut short"),
        (lambda raw: b"PK" + raw, r"y_1\.deb: it is no Debian package"),
        (lambda raw: raw.replace(b"data.tar.xz", b"else.tar.xz"), r"y_1\.deb: it holds no data"),
        (lambda raw: raw.replace(b"\xfd7zXZ", b"\xfd7zXY"), r"cannot read the archive .*y_1\.deb"),
        (lambda raw: raw, r"y_1\.deb holds no file nothing"),
    ],
)
def test_broken_archive_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = deb(tmp_path / "y_1.deb", WORDNET)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(MorError, match=message):
        list(read_members(path, "nothing"))


# Copies -----------------------------------------------------------------------------------------

NOVEL = [f"Paragraph {n}: " + " ".join(f"w{n * i % 97}x{i}" for i in range(40)) for n in range(20)]


def corpus(*texts: list[str]) -> list[tuple[str, list[str]]]:
    documents = [Document(str(n), "\n\n".join(text) + "\n") for n, text in enumerate(texts)]
    return [(d.name, d.text.strip("\n").split("\n\n")) for d in drop_copies(documents)]


def test_a_second_edition_is_left_out_and_a_quotation_cut() -> None:
    second = [p.upper().replace(" ", "\n") for p in NOVEL[3:]]
    essay = [NOVEL[5], *(f"{p} and so forth, {p[::-1]}" for p in NOVEL[:1]), "My own view."]
    own = ["Something else entirely, in " + " ".join(f"q{i}" for i in range(99))]
    assert corpus(NOVEL, second, own + essay) == [("0", NOVEL), ("2", own + essay[1:])]


def test_short_and_repeated_paragraphs_of_one_document_stay() -> None:
    text = ["Exeunt.", NOVEL[0], "Exeunt.", NOVEL[0]]
    assert corpus(text, ["Exeunt.", NOVEL[1]]) == [("0", text), ("1", ["Exeunt.", NOVEL[1]])]


def test_a_paragraph_with_a_few_words_changed_is_a_copy() -> None:
    changed = NOVEL[0].replace("w0x5", "other")
    other = " ".join(f"z{i}" for i in range(90))
    assert corpus(NOVEL, [changed, other]) == [("0", NOVEL), ("1", [other])]


def test_runs_do_not_depend_on_where_they_stand() -> None:
    words = [f"w{i}" for i in range(400)]
    assert set(sample_runs(words[100:200])) <= set(sample_runs(words))
    assert 50 < len(sample_runs(words)) < 150  # about a quarter
    assert sample_runs(words[: RUN - 1]) == []


# The parts, and the tools that fetch them --------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH; the English corpus in memory is forgotten."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    english._read.cache_clear()
    return folder


def tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_parts_from_the_cache_folder_need_no_tool(cache_dir: Path, tools: Path) -> None:
    cache_dir.mkdir(exist_ok=True)
    for name, members in (
        ("r-cran-janeaustenr", AUSTEN),
        ("r-cran-tidytext", TIDY),
        ("wordnet-base", WORDNET),
    ):
        deb(cache_dir / f"{name}_1_all.deb", members)
    names = [d.name for d in iter_documents("english:parts=glosses+novels")]
    assert [name.split("/")[0] for name in names] == ["novels"] * 4 + ["glosses"] * 2
    index = prepare(
        "english:parts=glosses+novels", cache_dir / "out", vocab_size=300, validation_fraction=0.3
    )
    assert index.source == "english:parts=glosses+novels"
    assert index.num_documents("train") + index.num_documents("validation") == 6


def test_a_tool_that_is_missing_is_named_with_its_part(cache_dir: Path, tools: Path) -> None:
    message = (
        r"^the part essays of the source english: apt-get is not installed, which fetches "
        r"anarchism; put the package's file anarchism_\*\.deb into .*; to leave that part out: "
        r"english:parts=brown$"
    )
    with pytest.raises(MorError, match=message):
        english._read(("essays", "brown"))


def test_a_tool_that_fails_is_quoted(cache_dir: Path, tools: Path) -> None:
    tool(tools, "apt-get", "print('W: old', file=sys.stderr)\nsys.exit('E: Unable to locate it')")
    with pytest.raises(MorError, match=r"could not fetch some-thing \(E: Unable to locate it\);"):
        fetch_deb("some-thing")
    assert list(cache_dir.iterdir()) == []


def test_fetched_once(cache_dir: Path, tools: Path) -> None:
    tool(tools, "apt-get", "open(f'{sys.argv[2]}_1%3a2_all.deb', 'w').write('deb')")
    assert fetch_deb("a-b").name == "a-b_1%3a2_all.deb"
    tool(tools, "npm", "open('c-1.0.tgz', 'w').write('tgz')")
    with pytest.raises(MorError, match=rf"c-1\.0\.tgz that npm fetched .* expected {'0' * 64}"):
        fetch_npm("c", "1.0", "0" * 64)
    (tools / "apt-get").unlink()
    assert fetch_deb("a-b").read_text() == "deb"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("english:parts=plays+poems", r"part 'poems' is not known; use some of: plays novels"),
        ("english:parts=", r"part '' is not known"),
        ("english:part=plays", r"setting 'part' is not known; use parts=plays\+novels"),
    ],
)
def test_wrong_settings(source: str, message: str) -> None:
    with pytest.raises(MorError, match=message):
        list(iter_documents(source))


@pytest.mark.network
def test_the_real_corpus(cache_dir: Path) -> None:
    english._read.cache_clear()
    sizes: dict[str, int] = {}
    documents = list(iter_documents("english"))
    for document in documents:
        part = document.name.split("/")[0]
        sizes[part] = sizes.get(part, 0) + len(document.text.encode())
    assert len({document.name for document in documents}) == len(documents)
    assert set(sizes) == set(english.PARTS)
    assert 39e6 < sum(sizes.values()) < 41e6
    names = {document.name for document in documents}
    # Austen's own edition is there, so the second one of the same novel is not.
    assert "novels/austen-pride-prejudice" in names or "novels/austen-pride-and-prejudice" in names
    assert "novels/pride-and-prejudice" not in names
