"""From a source of text to a prepared data folder: split, tokenizer, shards, index.

Two ways lead there. A small local source is **surveyed**: it is read three times (to survey it, to
train the tokenizer, to encode it), copies are left out, and whole documents are chosen so that
validation gets its share exactly. A large one is **streamed**: read once, with a given tokenizer,
and a hash of each text says which split it is in. Neither has to fit into memory.

Everything is written into a hidden folder beside the one asked for, which takes its name at the
very end: there is never half a folder. What is done survives a kill (`mor.data.journal`).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mor.data.bos import Bos, BosMode, apply_bos, resolve_bos
from mor.data.documents import describe_skipped
from mor.data.index import (
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    DataIndex,
)
from mor.data.journal import Workshop
from mor.data.plans import ReadingPlan, plan_single_pass, plan_survey
from mor.data.progress import Progress, no_progress
from mor.data.reuse import begun, check_target, differences, reuse
from mor.data.segments import write_segments
from mor.data.single_pass import StreamOptions, reads_once
from mor.data.survey import SourceChanged
from mor.data.tasks import TASK_PREFIX, open_task, task_tokenizer
from mor.data.tokenizer import (
    END_OF_TEXT_ID,
    DocumentEncoder,
    check_vocab_size,
    load_tokenizer,
    tokenizer_digest,
    tokenizer_vocab_size,
    train_tokenizer,
)
from mor.errors import MorError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_TOKENS = 2**26


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    vocab_size: int = 4096,
    tokenizer: str | Path | None = None,
    validation_fraction: float | None = None,
    shard_tokens: int = SHARD_TOKENS,
    seed: int = 0,
    text_field: str = "text",
    bos: BosMode = "auto",
    skip_bad_rows: bool = False,
    stream: StreamOptions | bool = False,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> DataIndex:
    """Prepare the documents of `source` in the folder `out` and return its index.

    Documents without text are left out (and counted). In a surveyed source so are exact copies of
    earlier ones, and the tokenizer is trained on the training split alone. In a streamed one
    copies stay, all in the same split. If `out` already holds this very preparation, its shards
    are verified and it is returned with `reused` set. One that was stopped before its end, by
    whatever means, goes on where its last finished shard ends.

    Args:
        source: see `mor.data.sources`; `hf:` sources are always streamed.
        out: the folder to make.
        vocab_size: tokens to train; not used with `tokenizer`.
        tokenizer: a Hugging Face tokenizer folder to use in place of training one.
        validation_fraction: part to validate on, by whole documents: of the bytes of a surveyed
            source (default 0.05), of the documents of a streamed one (default 0.001; not used
            where `stream` names a validation split).
        shard_tokens: a shard is full once it holds this many tokens; documents stay whole.
        seed: decides which documents are kept for validation.
        text_field: the field of a JSON line, or column, that holds the text.
        bos: whether documents begin with the tokenizer's BOS: `auto` as the tokenizer itself does
            when it adds special tokens, `always`, `never` (`mor.data.bos`).
        skip_bad_rows: leave out rows that give no text (`mor.data.documents.KINDS`) and count them,
            rather than raise at the first.
        stream: read the source once, as a stream, and how.
        workers: processes that encode; the result does not depend on it. Below 2 this process
            does it, with the tokenizer library's threads.
        overwrite: make it anew if `out` is a prepared folder, or an unfinished one was begun
            otherwise. Any other folder stays untouched.
        progress: called with the stage, the bytes done and their total.

    Raises:
        BadRow: a row gives no text; the message names the file and the row.
        MorError: a wrong parameter, source, tokenizer or output folder.
    """
    out = Path(out).expanduser()
    if shard_tokens < 1:
        raise MorError(f"shard_tokens is {shard_tokens}, expected 1 or more")
    if workers < 0:
        raise MorError(f"workers is {workers}, expected 0 or more")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    check_target(out)
    workshop = Workshop(out)
    task = open_task(str(source)) if str(source).startswith(TASK_PREFIX) else None
    if task is not None and tokenizer is not None:
        raise MorError(
            f"source {source} has a vocabulary of its own; leave out tokenizer={str(tokenizer)!r}"
        )
    chosen = None if tokenizer is None else load_tokenizer(tokenizer)
    chosen = chosen if task is None else task_tokenizer(task)
    if reads_once(source, stream):
        if chosen is None:
            raise MorError(
                f"source {source} is read as a stream, once: give the tokenizer to use "
                f"(--tokenizer DIR), none can be trained on the way"
            )
        options = stream if isinstance(stream, StreamOptions) else StreamOptions()
        options = options.pinned(source, begun(out, workshop))
        plan = plan_single_pass(source, options, text_field, validation_fraction, seed)
    else:
        plan = plan_survey(source, text_field, validation_fraction, seed, progress, skip_bad_rows)
    policy = _policy(chosen, bos)
    preparation = plan.identity | {
        # Not there in folders of earlier programs, which knew no BOS: None, too.
        "document_bos": policy.token if policy.added else None,
        "tokenizer_sha256": None if chosen is None else tokenizer_digest(chosen),
        "vocab_size": vocab_size if chosen is None else None,
        "shard_tokens": shard_tokens,
        "seed": seed,
    }
    if task is not None and chosen is not None:
        preparation["task"] = task.marks(chosen.get_vocab())
    if not overwrite and out.is_dir() and any(out.iterdir()):
        index = reuse(out, preparation, skip_bad_rows, progress)
        workshop.sweep()
        return index
    with workshop.open():
        try:
            _begin(workshop, preparation, plan, chosen, policy, skip_bad_rows, overwrite)
            return _make(workshop, str(source), plan, workers, progress, skip_bad_rows)
        except SourceChanged:
            workshop.discard()
            raise


def _begin(
    workshop: Workshop,
    preparation: Mapping[str, Any],
    plan: ReadingPlan,
    chosen: PreTrainedTokenizerFast | None,
    policy: Bos,
    skip_bad_rows: bool,
    overwrite: bool,
) -> None:
    """Go on with what is there of this preparation, or begin it with its tokenizer."""
    if workshop.segments:
        different = differences(workshop.preparation or {}, preparation)
        skipped = workshop.segments[-1].get("skipped", {})
        if skipped and not skip_bad_rows:
            different = "; ".join(filter(None, [different, f"there, {describe_skipped(skipped)}"]))
        if not different:
            workshop.resume()
            return
        if not overwrite:
            raise MorError(
                f"{workshop.path} holds an unfinished preparation that was begun otherwise "
                f"({different}); give the same command again to finish it, or --overwrite to "
                f"throw it away"
            )
    workshop.discard()
    workshop.folder.mkdir()
    if chosen is None:
        chosen = train_tokenizer(plan.texts(), int(preparation["vocab_size"]))
    try:
        apply_bos(chosen, policy).save_pretrained(workshop.folder / TOKENIZER_FOLDER)
    except MorError:
        raise
    except OSError:
        raise
    except Exception as error:  # of tokenizers, where it cannot write
        raise MorError(f"cannot write {workshop.target}: {error}") from error
    workshop.begin(preparation)


def _make(
    workshop: Workshop,
    source: str,
    plan: ReadingPlan,
    workers: int,
    progress: Progress,
    skip_bad_rows: bool,
) -> DataIndex:
    """Write what is left to write, and give the folder its name."""
    folder = workshop.folder
    assert workshop.preparation is not None
    # Always what was saved, so that a run that goes on encodes exactly as one that never stopped.
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    size = tokenizer_vocab_size(tokenizer)
    first = workshop.preparation.get("document_bos")
    start = () if first is None else (int(first),)
    encode = DocumentEncoder(tokenizer, start)
    written = write_segments(workshop, plan.passes, encode, size, workers, progress, skip_bad_rows)
    for split in (TRAIN, VALIDATION):
        if not written.shards.get(split):
            workshop.discard()
            lost = f"; {describe_skipped(written.skipped)}" if written.skipped else ""
            raise MorError(
                f"source {source} gave no {split} document; raise validation_fraction="
                f"{plan.identity['validation_fraction']}, or name a validation split{lost}"
                if split == VALIDATION
                else f"source {source} gave no document to train on{lost}"
            )
    survey = plan.survey
    index = DataIndex(
        directory=folder,
        splits={split: tuple(written.shards[split]) for split in (TRAIN, VALIDATION)},
        vocab_size=size,
        eos_token_id=int(tokenizer.eos_token_id),
        source=source,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        program=program_name(),
        preparation=workshop.preparation,
        num_duplicates=survey.num_duplicates if survey else 0,
        num_empty=survey.num_empty if survey else written.num_empty,
        bos_token_id=start[0] if start else resolve_bos(tokenizer, "never").token,
        add_bos_token=bool(start),
        skipped=survey.skipped if survey else written.skipped,
    )
    index.save()
    workshop.finish()
    return replace(index, directory=workshop.target)


def _policy(chosen: PreTrainedTokenizerFast | None, mode: str) -> Bos:
    """What documents begin with. One that is to be trained has a BOS and does not use it itself."""
    if chosen is not None:
        return resolve_bos(chosen, mode)
    if mode not in get_args(BosMode):
        raise MorError(f"bos={mode!r} is not known; use one of: {', '.join(get_args(BosMode))}")
    return Bos(END_OF_TEXT_ID, mode == "always")


def program_name() -> str:
    """Name and version of this program, for an index."""
    name = "mixture-of-recursions"
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return f"{name} (not installed)"
