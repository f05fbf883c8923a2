"""What is wrong with an image or a sound that somebody gave."""

from __future__ import annotations

from mor.errors import MorError, missing_package


class BadMedia(MorError):
    """Bytes that give no image or no sound, or one beyond a limit; the message says which."""


def need_media(what: str, package: str) -> MorError:
    """The error to raise where a package of the extra `media` is not installed."""
    return missing_package(f"{what} need", package, "media")


def check_bytes(data: bytes, what: str, max_bytes: int) -> None:
    """Refuse no bytes, and too many. Raises `BadMedia`."""
    if not data:
        raise BadMedia(f"the {what} is empty: it has no bytes")
    if len(data) > max_bytes:
        raise BadMedia(f"the {what} has {len(data):,} bytes, more than max_bytes={max_bytes:,}")
