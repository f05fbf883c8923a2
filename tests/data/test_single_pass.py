"""Compressed files, Parquet, datasets in the hub's form, and preparing them as a stream."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from mor.data import (
    TRAIN,
    VALIDATION,
    DataIndex,
    Limits,
    StreamOptions,
    iter_documents,
    load_tokenizer,
    prepare,
    train_tokenizer,
)
from mor.data import hub as hub_module
from mor.data.encoding import text_hash
from mor.data.hub import HubSource
from mor.errors import MorError
from tests.data.streams import texts, write_parquet


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(30), 300).save_pretrained(folder)
    return folder


# The hub ---------------------------------------------------------------------------------------


def test_a_dataset_in_the_hubs_form(dataset: Path) -> None:
    found = list(HubSource(str(dataset), split="train").read())
    assert [d.text for d in found] == texts(30)
    assert [d.name for d in found[:2]] == ["train:1", "train:2"]
    assert [d.text for d in HubSource(str(dataset), split="validation").read()] == texts(3, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, r"hf:.* tset cannot be opened: Bad split: tset"),
        ({"config": "nope"}, r"hf:.* nope train cannot be opened: BuilderConfig 'nope' not found"),
        ({"text_field": "body"}, r"has no column 'body'; its columns: 'id', 'text'"),
        ({"revision": "main"}, r"is a local folder, which has no revision 'main'"),
    ],
)
def test_what_the_dataset_does_not_have(
    dataset: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MorError, match=message):
        HubSource(str(dataset), **options)


def test_a_dataset_that_cannot_be_reached() -> None:
    with pytest.raises(MorError, match=r"hf:no/such train cannot be opened: .*"):
        HubSource("no/such")


def test_a_file_that_breaks_on_the_way(dataset: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [*texts(5)])
    (tmp_path / "train-1.parquet").write_bytes((tmp_path / "train-0.parquet").read_bytes()[:300])
    reading = iter(HubSource(str(tmp_path)).read())
    for _ in range(5):
        next(reading)
    with pytest.raises(MorError, match=r"fails at document train:6: "):
        next(reading)


def test_a_dataset_of_the_hub_is_pinned_to_its_commit(
    dataset: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub itself is not to be had in a test: its answers are played, the rest is real."""
    import datasets

    asked: list[str | None] = []
    commits = {None: "c1", "c1": "c1", "main": "c1"}

    def dataset_info(self: Any, name: str, revision: str | None = None) -> Any:
        return SimpleNamespace(sha=commits[revision])

    load = datasets.load_dataset

    def load_dataset(path: str, *args: Any, revision: str | None = None, **kwargs: Any) -> Any:
        assert path == "some/corpus"
        asked.append(revision)
        return load(str(dataset), *args, **kwargs)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options: dict[str, Any] = {"tokenizer": tokenizer, "validation_fraction": 0.3}
    index = prepare("hf:some/corpus", tmp_path / "out", **options)
    assert index.preparation["source"]["revision"] == "c1"
    assert index.preparation["source"]["dataset"] == "some/corpus"
    commits |= {None: "c2", "c2": "c2"}  # the dataset changes
    assert prepare("hf:some/corpus", tmp_path / "out", **options).reused
    assert set(asked) == {"c1"}
    newer = prepare("hf:some/corpus", tmp_path / "newer", **options)
    assert newer.preparation["source"]["revision"] == "c2"
    pinned = options | {"stream": StreamOptions(hf_revision="c2")}
    with pytest.raises(MorError, match=r"already holds another preparation \(source is"):
        prepare("hf:some/corpus", tmp_path / "out", **pinned)


# Preparing -------------------------------------------------------------------------------------


def documents(index: DataIndex) -> dict[str, list[str]]:
    tokenizer = load_tokenizer(index.tokenizer_dir)
    return {
        split: [
            tokenizer.decode(shard.document(i)[:-1])
            for shard in index.open_shards(split)
            for i in range(shard.num_documents)
        ]
        for split in index.splits
    }


def test_a_stream_is_split_by_the_hash_of_its_texts(
    dataset: Path, tokenizer: Path, tmp_path: Path
) -> None:
    index = prepare(
        f"hf:{dataset}", tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.3, seed=5
    )
    found = documents(index)
    held_out = [t for t in texts(30) if text_hash(t.encode(), 5) < 0.3 * 2**64]
    assert found[VALIDATION] == held_out
    assert found[TRAIN] == [t for t in texts(30) if t not in held_out]
    assert 0 < len(held_out) < 30
    assert prepare(
        f"hf:{dataset}", tmp_path / "out", tokenizer=tokenizer, validation_fraction=0.3, seed=5
    ).reused


@given(st.text(min_size=1), st.integers(0, 2**32))
def test_copies_are_on_the_same_side(text: str, seed: int) -> None:
    assert text_hash(text.encode(), seed) == text_hash(text.encode(), seed)


def test_a_validation_split_of_its_own(dataset: Path, tokenizer: Path, tmp_path: Path) -> None:
    options = StreamOptions(Limits(max_documents=7), hf_validation_split="validation")
    index = prepare(f"hf:{dataset}", tmp_path / "out", tokenizer=tokenizer, stream=options)
    assert documents(index) == {TRAIN: texts(7), VALIDATION: texts(3, 100)}


def test_limits(dataset: Path, tokenizer: Path, tmp_path: Path) -> None:
    def count(name: str, **limits: int) -> tuple[int, int]:
        index = prepare(
            *(f"hf:{dataset}", tmp_path / name),
            tokenizer=tokenizer,
            validation_fraction=0.3,
            stream=StreamOptions(Limits(**limits)),
        )
        return (
            index.num_documents(TRAIN) + index.num_documents(VALIDATION),
            index.num_tokens(TRAIN) + index.num_tokens(VALIDATION),
        )

    assert count("documents", max_documents=12)[0] == 12
    _, most = count("all")
    _, tokens = count("tokens", max_tokens=most // 2)
    assert most // 2 <= tokens < most // 2 + most // 20
    assert count("both", max_documents=12, max_tokens=10**9)[0] == 12


def test_empty_rows_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", ["", *texts(12), " ", ""])
    index = prepare(
        *(tmp_path / "in", tmp_path / "out"),
        tokenizer=tokenizer,
        stream=True,
        validation_fraction=0.3,
    )
    assert (index.num_empty, index.num_duplicates) == (3, 0)
    assert index.num_documents(TRAIN) + index.num_documents(VALIDATION) == 12


def test_any_number_of_workers_writes_the_same(
    dataset: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Batches come back in order: compare every byte, with batches small enough to be many."""

    def bytes_of(workers: int) -> dict[str, bytes]:
        out = tmp_path / str(workers)
        prepare(
            *(f"hf:{dataset}", out),
            tokenizer=tokenizer,
            validation_fraction=0.3,
            shard_tokens=120,
            workers=workers,
        )
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file()
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mor.data.encoding._BATCH_DOCUMENTS", 2)
        alone = bytes_of(1)
        assert bytes_of(3) == alone
    assert bytes_of(0) == alone
    assert sum(name.startswith("train") for name in alone) > 3


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            "hf:DATA",
            {},
            r"is read as a stream, once: give the tokenizer to use \(--tokenizer DIR\)",
        ),
        ("DATA", {"stream": True}, r"give the tokenizer to use"),
        ("DATA", {"stream": StreamOptions(hf_split="x")}, r"none of Hugging Face's; write hf:"),
        ("shakespeare", {"stream": True}, r"shakespeare cannot be read as a stream"),
        ("DATA", {"workers": -1}, r"workers is -1, expected 0 or more"),
    ],
)
def test_what_cannot_be_streamed(
    dataset: Path, tmp_path: Path, source: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MorError, match=message):
        prepare(source.replace("DATA", str(dataset)), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_wrong_limits() -> None:
    with pytest.raises(MorError, match=r"max_tokens is 0, expected 1 or more"):
        Limits(max_tokens=0)


def test_no_document_for_validation(dataset: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(MorError, match=r"gave no validation document; raise validation_fraction=1"):
        prepare(f"hf:{dataset}", tmp_path / "out", tokenizer=tokenizer, validation_fraction=1e-9)
    assert list(tmp_path.iterdir()) == []


def test_packages_of_the_extra_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(b"x"))
    for package in ("pyarrow", "backports", "datasets"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    for name, package in (("a.parquet", "pyarrow"), ("b.txt.zst", "backports.zstd")):
        with pytest.raises(
            MorError, match=rf"need the package {package}, .*: pip install -e '\.\[data"
        ):
            list(iter_documents(tmp_path / name))
    with pytest.raises(MorError, match=r"hf: sources need the package datasets"):
        hub_module.HubSource("x")
