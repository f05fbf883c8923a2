"""From a source of text to a prepared data folder: split, tokenizer, shards, index.

The source is read three times (to survey it, to train the tokenizer, to encode it), so it never
has to fit into memory. Everything is written into a hidden folder beside the one asked for, which
takes its name at the very end: there is never half a folder.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from mor.data.documents import Document
from mor.data.folders import whole_folder
from mor.data.index import INDEX_FILE, TOKENIZER_FOLDER, TRAIN, VALIDATION, DataIndex
from mor.data.progress import Progress, no_progress
from mor.data.splits import check_fraction, choose_validation
from mor.data.survey import Survey, survey_source
from mor.data.tokenizer import (
    DocumentEncoder,
    check_vocab_size,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_vocab_size,
    train_tokenizer,
)
from mor.data.writer import SplitWriter
from mor.errors import MorError

SHARD_TOKENS = 2**26
_BATCH_BYTES = 2**20  # text encoded at a time: enough to keep the encoder's threads busy
_OURS = re.compile(rf"{re.escape(INDEX_FILE)}|{TOKENIZER_FOLDER}|({TRAIN}|{VALIDATION})-\d+\.bin")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    validation_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
    text_field: str = "text",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> DataIndex:
    """Prepare the documents of `source` in the folder `out` and return its index.

    Documents without text and exact copies of earlier ones are left out (and counted), so that no
    text is in both splits. The tokenizer is trained on the training split alone. If `out` already
    holds this very preparation, its shards are verified and it is returned with `reused` set.

    Args:
        source: see `mor.data.sources`.
        out: the folder to make.
        vocab_size: tokens to train; not used with `tokenizer`.
        tokenizer: a Hugging Face tokenizer folder to use in place of training one.
        validation_fraction: part of the bytes to validate on, by whole documents.
        shard_tokens: a shard is full once it holds this many tokens; documents stay whole.
        seed: decides which documents are kept for validation.
        text_field: the field of a JSON line that holds the text.
        overwrite: make it anew if `out` is a prepared folder. Any other folder stays untouched.
        progress: told the stage, the bytes done and their total.

    Raises:
        MorError: a wrong parameter, source, tokenizer or output folder; nothing is left behind.
    """
    out = Path(out).expanduser()
    check_fraction(validation_fraction)
    if shard_tokens < 1:
        raise MorError(f"shard_tokens is {shard_tokens}, expected 1 or more")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    _check_target(out)
    chosen = None if tokenizer is None else load_tokenizer(tokenizer)
    survey = survey_source(str(source), text_field, progress)
    held_out = choose_validation(survey.sizes, validation_fraction, seed)
    preparation: dict[str, Any] = {
        "source_sha256": survey.sha256,
        "tokenizer_sha256": None if chosen is None else tokenizer_digest(chosen),
        "vocab_size": vocab_size if chosen is None else None,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
        "seed": seed,
    }
    if not overwrite and out.is_dir() and any(out.iterdir()):
        return _reuse(out, preparation)
    with whole_folder(out) as folder:
        if chosen is None:
            chosen = train_tokenizer(_training_texts(survey, held_out, progress), vocab_size)
        chosen.save_pretrained(folder / TOKENIZER_FOLDER)
        size = tokenizer_vocab_size(chosen)
        with (
            SplitWriter(folder, TRAIN, size, shard_tokens) as train,
            SplitWriter(folder, VALIDATION, size, shard_tokens) as validation,
        ):
            for document, tokens, num_bytes in _encoded(survey, DocumentEncoder(chosen), progress):
                split = validation if document.name in held_out else train
                split.append(document.name, tokens, num_bytes)
        index = DataIndex(
            directory=folder,
            splits={TRAIN: tuple(train.shards), VALIDATION: tuple(validation.shards)},
            vocab_size=size,
            eos_token_id=int(chosen.eos_token_id),
            source=str(source),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            program=_program(),
            preparation=preparation,
            num_duplicates=survey.num_duplicates,
            num_empty=survey.num_empty,
        )
        index.save()
    return replace(index, directory=out)


def _check_target(out: Path) -> None:
    """Let a missing, an empty or a prepared folder through, nothing else: it may be replaced."""
    try:
        if not out.exists():
            return
        if not out.is_dir():
            raise MorError(f"output {out} is a file, expected a folder")
        names = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise MorError(f"cannot look into output {out}: {error.strerror or error}") from error
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign:
        raise MorError(
            f"output folder {out} holds other things ({foreign[0]}); choose a new folder"
        )


def _reuse(out: Path, preparation: Mapping[str, Any]) -> DataIndex:
    index = DataIndex.load(out)
    differences = [
        f"{name} is {index.preparation.get(name)} there, {asked} was asked for"
        for name, asked in preparation.items()
        if index.preparation.get(name) != asked
    ]
    if differences:
        raise MorError(
            f"{out} already holds another preparation ({'; '.join(differences)}); "
            f"choose another folder, or overwrite it"
        )
    for _ in index.verify():
        pass
    load_tokenizer(index.tokenizer_dir)
    return replace(index, reused=True)


def _training_texts(survey: Survey, held_out: set[str], progress: Progress) -> Iterator[str]:
    total = survey.num_bytes - sum(survey.sizes[name] for name in held_out)
    done = 0
    for document, num_bytes in survey.documents():
        if document.name not in held_out:
            yield document.text
            done += num_bytes
            progress("training the tokenizer", done, total)


def _encoded(
    survey: Survey, encode: DocumentEncoder, progress: Progress
) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yield every document with its tokens `[num_tokens]` and its size in bytes."""
    done = 0
    for batch in _batches(survey.documents()):
        encoded = encode([document.text for document, _ in batch])
        for (document, num_bytes), tokens in zip(batch, encoded, strict=True):
            yield document, tokens, num_bytes
            done += num_bytes
            progress("encoding", done, survey.num_bytes)


def _batches(
    documents: Iterator[tuple[Document, int]],
) -> Iterator[list[tuple[Document, int]]]:
    batch: list[tuple[Document, int]] = []
    size = 0
    for document, num_bytes in documents:
        batch.append((document, num_bytes))
        size += num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _program() -> str:
    name = "mixture-of-recursions"
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return f"{name} (not installed)"
