"""What to read for a preparation: after a survey, or straight through as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mor.data.index import TRAIN, VALIDATION
from mor.data.progress import Progress
from mor.data.segments import Pass
from mor.data.single_pass import StreamOptions, open_readings
from mor.data.splits import check_fraction, choose_validation, is_held_out
from mor.data.survey import Survey, survey_source

SURVEYED_FRACTION, STREAMED_FRACTION = 0.05, 0.001


@dataclass(frozen=True)
class ReadingPlan:
    """What to read, and how.

    Attributes:
        identity: what decides the content: source, split, limits.
        passes: over the source, while encoding.
        texts: the texts to train a tokenizer on; none in a stream.
        survey: if there was one.
    """

    identity: dict[str, Any]
    passes: list[Pass]
    texts: Callable[[], Iterator[str]] = lambda: iter(())
    survey: Survey | None = None


def plan_survey(
    source: str | Path,
    text_field: str,
    fraction: float | None,
    seed: int,
    progress: Progress,
    skip_bad_rows: bool = False,
) -> ReadingPlan:
    """Look through the source first: copies are left out, validation gets its share of the bytes.

    Raises:
        MorError: `fraction` is out of range, the source is wrong or holds too little, or a row
            gives no text and is not to be skipped.
    """
    fraction = SURVEYED_FRACTION if fraction is None else fraction
    check_fraction(fraction)
    survey = survey_source(str(source), text_field, progress, skip_bad_rows=skip_bad_rows)
    held_out = choose_validation(survey.sizes, fraction, seed)

    def split_of(name: str, text_hash: int) -> str:
        return VALIDATION if name in held_out else TRAIN

    return ReadingPlan(
        {"source_sha256": survey.sha256, "validation_fraction": fraction},
        [Pass(survey.read, split_of, num_bytes=survey.num_bytes)],
        lambda: _training_texts(survey, held_out, progress),
        survey,
    )


def plan_single_pass(
    source: str | Path, options: StreamOptions, text_field: str, fraction: float | None, seed: int
) -> ReadingPlan:
    """Read the source once; a hash of each text decides, or another split is for validation.

    Raises:
        MorError: `fraction` is out of range, or a source cannot be opened.
    """
    first, second = open_readings(source, options, text_field)
    held_out = STREAMED_FRACTION if fraction is None else fraction
    if second is None:
        check_fraction(held_out)
    else:
        held_out = 0.0

    def split_of(name: str, text_hash: int) -> str:
        return VALIDATION if is_held_out(text_hash, held_out) else TRAIN

    passes = [Pass(first.read, split_of, options.limits, num_documents=first.num_documents())]
    if second:
        passes.append(Pass(second.read, lambda name, text_hash: VALIDATION))
    identity: dict[str, Any] = {
        "source": first.identity(),
        "validation_source": second.identity() if second else None,
        "validation_fraction": held_out,
    }
    return ReadingPlan(identity | asdict(options.limits), passes)


def _training_texts(survey: Survey, held_out: set[str], progress: Progress) -> Iterator[str]:
    total = survey.num_bytes - sum(survey.sizes[name] for name in held_out)
    done = 0
    for document, num_bytes in survey.documents():
        if document.name not in held_out:
            yield document.text
            done += num_bytes
            progress("training the tokenizer", done, total)
