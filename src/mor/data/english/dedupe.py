"""Take out paragraphs that an earlier document holds already, also in a slightly other wording.

A corpus put together from several packages holds some texts twice: two editions of one novel, a
quotation in many essays. A model trained on one copy and validated on the other would look better
than it is. MinHash finds such pairs in corpora too large to compare; a few tens of megabytes can be
compared as they are, by their runs of eight words.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np

from mor.data.documents import Document

RUN = 8
"""Words of a run. A paragraph with fewer is never taken out."""

SHARED = 0.5
"""A paragraph is a copy if more than this part of its runs was seen, a document likewise."""

_SAMPLING = np.uint64(4)  # runs whose hash is a multiple are looked at: a quarter of the memory
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def drop_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the documents without paragraphs that an earlier one holds.

    Letters' case, punctuation and line breaks do not matter. A document of which more than half the
    words are copies is left out as a whole. What repeats inside one document stays.
    """
    whole: set[bytes] = set()
    runs: set[int] = set()
    for document in documents:
        kept, new_whole, new_runs = [], set(), set()
        total = lost = 0
        for paragraph in document.text.strip("\n").split("\n\n"):
            words = re.findall(r"[^\W_]+", paragraph.lower())
            digest = sha256(" ".join(words).encode()).digest()[:16]
            sampled = sample_runs(words)
            seen = sum(run in runs for run in sampled)
            total += len(words)
            if len(words) >= RUN and (digest in whole or seen > SHARED * len(sampled)):
                lost += len(words)
                continue
            kept.append(paragraph)
            if len(words) >= RUN:
                new_whole.add(digest)
                new_runs.update(sampled)
        if lost <= SHARED * total:
            whole |= new_whole
            runs |= new_runs
            yield Document(document.name, "\n\n".join(kept) + "\n")


def sample_runs(words: list[str]) -> list[int]:
    """Hashes of about a quarter of the runs of eight words: always the same ones of a run."""
    if len(words) < RUN:
        return []
    ids = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    count = len(words) - RUN + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN):  # wraps around, as a hash may
        hashes = (hashes ^ ids[offset : offset + count]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    chosen: list[int] = hashes[hashes % _SAMPLING == 0].tolist()
    return chosen
