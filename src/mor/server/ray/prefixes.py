"""Which replica has the pages of a prompt's beginning: what a request is sent by."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

BLOCK = 64
"""Bytes of text that stand for a page: about 16 tokens of English."""
MOST_BLOCKS = 256


def blocks_of(body: bytes) -> tuple[int, ...]:
    """Hashes of ever longer beginnings of a request's prompt, a block of bytes longer each.

    Two requests whose prompts begin alike have equal hashes at the beginning. Of several prompts
    the first counts. What is no such request has no blocks.

    Args:
        body: of a call of the API.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(asked, dict):
        return ()
    hashes: list[int] = []
    rest, seed = b"", b""
    for part in _parts(asked):
        text = rest + part[: BLOCK * MOST_BLOCKS].encode("utf-8", "surrogatepass")
        whole = min(len(text) // BLOCK, MOST_BLOCKS - len(hashes))
        for place in range(whole):
            block = text[BLOCK * place : BLOCK * (place + 1)]
            seed = hashlib.blake2b(seed + block, digest_size=8).digest()
            hashes.append(int.from_bytes(seed, "big"))
        rest = text[BLOCK * whole :]
        if len(hashes) == MOST_BLOCKS:
            break
    return tuple(hashes)


def _parts(asked: Mapping[str, Any]) -> Iterator[str]:
    """The prompt piece by piece, in the order in which templates put it together."""
    if "messages" not in asked:
        prompt = asked.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        yield prompt if isinstance(prompt, str) else json.dumps(prompt)
        return
    if asked.get("tools"):
        yield json.dumps(asked["tools"])
    messages = asked["messages"]
    for message in messages if isinstance(messages, list) else ():
        yield json.dumps(message)


class PrefixTable:
    """Remembers which replicas have seen which beginnings, and ranks them for a request.

    Args:
        slack: requests that a replica may have more than the least busy one and still be chosen
            for its pages.
        most: hashes to remember; those not used for longest are forgotten.
    """

    def __init__(self, slack: int = 4, most: int = 1 << 16) -> None:
        self.slack, self.most = slack, most
        self._seen: OrderedDict[int, dict[str, None]] = OrderedDict()

    def record(self, blocks: Sequence[int], replica: str) -> None:
        """Note that ``replica`` has been sent a prompt with these blocks."""
        for block in blocks:
            self._seen.setdefault(block, {})[replica] = None
            self._seen.move_to_end(block)
        while len(self._seen) > self.most:
            self._seen.popitem(last=False)

    def match(self, blocks: Sequence[int], replica: str) -> int:
        """How many blocks at the beginning ``replica`` has seen."""
        for place, block in enumerate(blocks):
            if replica not in self._seen.get(block, ()):
                return place
        return len(blocks)

    def forget(self, replica: str) -> None:
        """A replica is gone, and its pages with it."""
        for block in [block for block, names in self._seen.items() if replica in names]:
            del self._seen[block][replica]
            if not self._seen[block]:
                del self._seen[block]

    def rank(self, blocks: Sequence[int], loads: Mapping[str, int]) -> list[str]:
        """Replicas, the best first.

        Of those that are at most ``slack`` requests busier than the least busy one, the one with
        the longest beginning in common comes first; among equals the least busy one; among those
        the one that the first block's hash names, so that several routers agree. Then the others,
        by how busy they are.

        Args:
            blocks: of the request.
            loads: requests under way, by replica.
        """
        if not loads:
            return []
        bound = min(loads.values()) + self.slack
        first = blocks[0] if blocks else 0

        def order(name: str) -> tuple[bool, int, int, int]:
            over = loads[name] > bound
            same = 0 if over else self.match(blocks, name)
            chance = hashlib.blake2b(f"{first} {name}".encode(), digest_size=8).digest()
            return over, -same, loads[name], int.from_bytes(chance, "big")

        return sorted(loads, key=order)
