"""What `index.json` of a prepared folder must hold, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mor.data.shards import ShardInfo

_NUMBERS = ("vocab_size", "eos_token_id", "num_duplicates", "num_empty")
_STORED = (*_NUMBERS, "source", "command", "program", "preparation")
_LATER = ("bos_token_id", "add_bos_token", "skipped")  # not in folders of earlier programs


def check_content(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `DataIndex`, from what its file holds.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: something is missing or wrong.
    """
    splits = {
        split: tuple(_shard_info(shard) for shard in entry["shards"])
        for split, entry in content["splits"].items()
    }
    for name in _NUMBERS:
        if not isinstance(content[name], int):
            raise TypeError(f"{name} is {content[name]!r}, expected a whole number")
    bos, added = content.get("bos_token_id"), content.get("add_bos_token")
    if not (bos is None or type(bos) is int) or not (added is None or type(added) is bool):
        raise TypeError(f"bos_token_id is {bos!r} and add_bos_token {added!r}")
    if added and bos is None:
        raise ValueError("add_bos_token is true, but there is no bos_token_id")
    if not all(type(count) is int for count in content.get("skipped", {}).values()):
        raise TypeError(f"skipped is {content['skipped']!r}, expected counts by kind")
    later = {name: content[name] for name in _LATER if name in content}
    return {"splits": splits} | {name: content[name] for name in _STORED} | later


def _shard_info(entry: Mapping[str, Any]) -> ShardInfo:
    info = ShardInfo(**entry)
    for part in fields(ShardInfo):
        value = getattr(info, part.name)
        if not isinstance(value, str if part.name in ("file", "sha256") else int):
            raise TypeError(f"{part.name} of a shard is {value!r}")
    if Path(info.file).name != info.file:
        raise ValueError(f"shard file {info.file!r} is outside the folder")
    return info
