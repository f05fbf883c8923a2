"""The loop that writes a prepared folder: read, encode, split, write, note what is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mor.data.encoding import batches, encoder
from mor.data.journal import Workshop
from mor.data.progress import Progress, tell_skipped
from mor.data.shards import ShardInfo
from mor.data.single_pass import Limits
from mor.data.sources import Reading
from mor.data.tokenizer import DocumentEncoder
from mor.data.writer import SegmentWriter

_COUNTS = ("documents", "tokens", "bytes", "empty")


@dataclass(frozen=True)
class Pass:
    """One reading of a source while encoding.

    Attributes:
        read: begins it at a position.
        split_of: the split of a document, by its name and the hash of its text.
        limits: when to stop before the end.
        num_bytes, num_documents: of the whole pass, where known.
    """

    read: Callable[[Mapping[str, Any] | None], Reading]
    split_of: Callable[[str, int], str]
    limits: Limits = field(default_factory=Limits)
    num_bytes: int | None = None
    num_documents: int | None = None


@dataclass(frozen=True)
class Written:
    """What has become of a source.

    Attributes:
        shards: by split.
        num_empty: documents without text.
        skipped: bad rows by kind.
    """

    shards: dict[str, list[ShardInfo]]
    num_empty: int
    skipped: dict[str, int]


def write_segments(
    workshop: Workshop,
    passes: list[Pass],
    encode: DocumentEncoder,
    vocab_size: int,
    workers: int,
    progress: Progress,
    skip_bad_rows: bool,
) -> Written:
    """Write all segments that are not there yet.

    Raises:
        BadRow: the first row that gives no text, unless `skip_bad_rows`: then they are counted.
        MorError: as the source does, or something cannot be written.
    """
    preparation = workshop.preparation or {}
    last: Mapping[str, Any] = workshop.segments[-1] if workshop.segments else {}
    counts: dict[str, int] = dict(last.get("counts", dict.fromkeys(_COUNTS, 0)))
    skipped: dict[str, int] = dict(last.get("skipped", {}))
    seed = int(preparation["seed"])
    with SegmentWriter(workshop.folder, vocab_size, int(preparation["shard_tokens"])) as writer:
        for segment in workshop.segments:
            for split, shard in segment["shards"].items():
                writer.shards.setdefault(split, []).append(ShardInfo(**shard))
        if last.get("end"):
            return Written(writer.shards, counts["empty"], skipped)

        def commit(**place: Any) -> None:
            done = {split: asdict(shard) for split, shard in writer.close_segment().items()}
            kept = {"counts": dict(counts)} | ({"skipped": dict(skipped)} if skipped else {})
            workshop.commit({"shards": done} | kept | place)

        for number in range(int(last.get("pass", 0)), len(passes)):
            here = passes[number]
            resumed = number == last.get("pass")
            reading = here.read(last["position"] if resumed else None)
            skip = int(last["skip"]) if resumed else 0
            with encoder(encode, seed, workers) as pipeline:
                for batch, encoded in pipeline.run(batches(reading)):
                    begin = 0
                    for i, end in enumerate(encoded.ends.tolist()):
                        tokens, begin = encoded.tokens[begin:end], end
                        if skip:  # in a segment that is finished
                            skip -= 1
                            continue
                        if here.limits.reached(counts["documents"], counts["tokens"]):
                            break
                        if (bad := batch.bad.get(i)) is not None:
                            if not skip_bad_rows:
                                raise bad
                            skipped[bad.kind] = skipped.get(bad.kind, 0) + 1
                            continue
                        num_bytes = int(encoded.num_bytes[i])
                        counts["bytes"] += num_bytes
                        if encoded.blank[i]:
                            counts["empty"] += 1
                            continue
                        split = here.split_of(batch.names[i], int(encoded.hashes[i]))
                        writer.append(split, batch.names[i], tokens, num_bytes)
                        counts["documents"] += 1
                        counts["tokens"] += tokens.size
                        if writer.full:
                            commit(**{"pass": number, "position": batch.before, "skip": i + 1})
                    progress("encoding", counts["bytes"], _total_bytes(here, counts))
                    tell_skipped(progress, skipped)
                    if here.limits.reached(counts["documents"], counts["tokens"]):
                        break
        commit(end=True)
        return Written(writer.shards, counts["empty"], skipped)


def _total_bytes(here: Pass, counts: Mapping[str, int]) -> int | None:
    """Bytes of the whole pass, an estimate where only documents or tokens are known."""
    if here.num_bytes is not None:
        return here.num_bytes
    documents = here.limits.max_documents or here.num_documents
    tokens = here.limits.max_tokens
    parts = [counts["documents"] / documents] if documents else []
    parts += [counts["tokens"] / tokens] if tokens else []
    part = min(1.0, max(parts, default=0.0))
    return max(counts["bytes"], round(counts["bytes"] / part)) if part else None
