"""Files and folders that are whole or absent, whenever the process is killed.

Everything is written beside its place first, under a name that ends in ``.partial``, and takes its
own name in one rename. Standard library only: this module lies on the lowest floor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mor.errors import MorError

PARTIAL = ".partial"


# Files ------------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``path`` and flush it to the disk; it is there whole or as it was before.

    Text is written as UTF-8.

    Raises:
        OSError: the disk refuses; ``path`` is as it was.
    """
    with replace_file(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(fresh)


@contextmanager
def replace_file(target: Path, *, contended: bool = False) -> Iterator[Path]:
    """A path beside ``target`` to write a file to; it becomes ``target`` if no exception passes.

    Args:
        target: the file to make or replace.
        contended: several processes may be writing the same file, so that each needs a name of
            its own. Otherwise the name is always the same, and what a kill left is written over.

    Raises:
        OSError: the disk refuses; ``target`` is as it was.
    """
    own = f".{secrets.token_hex(4)}" if contended else ""
    fresh = target.with_name(target.name + own + PARTIAL)
    try:
        yield fresh
        os.replace(fresh, target)
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def append_jsonl(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append ``record`` to ``path`` as one line of strict JSON.

    Numbers that are not finite become ``null``. Where a killed process left half a line at the
    end, that half is dropped first, so the new line never runs into it.
    """
    line = json.dumps(_strict(record), ensure_ascii=False, allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _mend_tail(file)
        file.write(line.encode())


def _mend_tail(file: Any) -> None:
    """Make the file end with a newline: complete a whole last record, drop half of one."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start > 0 and b"\n" not in tail:
        step = min(4096, start)
        start = file.seek(start - step)
        tail = file.read(step) + tail
    tail = tail.rpartition(b"\n")[2]
    if not tail:
        return
    try:
        json.loads(tail)
    except ValueError:
        file.truncate(end - len(tail))
    else:
        file.write(b"\n")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have the system write one file, or the names in one folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and writes their names itself
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Folders ----------------------------------------------------------------------------------------


def share_tree(folder: Path) -> None:
    """Let who may use ``folder`` use what is in it: its rights are those that the umask gave.

    Some libraries write a file for its owner alone, whatever the umask says: safetensors does.
    """
    rights = folder.stat().st_mode
    for path in folder.rglob("*"):
        if not path.is_symlink():
            also = 0o777 if path.is_dir() else 0o666 | (path.stat().st_mode & 0o100 and 0o111)
            path.chmod(rights & also)


def flush_tree(folder: Path) -> None:
    """Give all under ``folder`` its rights, and have the system write it to the disk."""
    share_tree(folder)
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def check_new(out: Path) -> None:
    """Refuse to write into something that is already there.

    Raises:
        MorError: ``out`` is a file, or a folder with something in it.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        kind = "folder that is not empty" if out.is_dir() else "file"
        raise MorError(f"{out}: is a {kind}; give a new folder, nothing is overwritten")


def check_folder(out: Path) -> None:
    """Refuse, before any work, a folder to fill that cannot be one.

    Raises:
        MorError: ``out`` is a file, or lies below one.
    """
    if out.exists() and not out.is_dir():
        raise MorError(f"out={out} is a file; a folder, new or old, would be right")
    place = next(parent for parent in [out.absolute(), *out.absolute().parents] if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise MorError(f"out={out} cannot be written: {place} is no folder that you may write to")


@contextmanager
def replace_folder(out: Path, *, overwrite: bool = False, contended: bool = True) -> Iterator[Path]:
    """An empty folder beside ``out`` to write into; it becomes ``out`` if no exception passes.

    A folder that is at ``out`` already goes in the last moment, when the new one is whole and
    flushed to the disk.

    Args:
        out: the folder to make or replace.
        overwrite: whether ``out`` may hold something; otherwise it may be empty at most.
        contended: as for :func:`replace_file`.

    Raises:
        OSError: the disk refuses; ``out`` is as it was.
    """
    own = f".{secrets.token_hex(4)}" if contended else ""
    fresh = out.with_name(out.name + own + PARTIAL)
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        flush_tree(fresh)
        if out.is_dir():  # some systems do not rename onto a folder, even an empty one
            shutil.rmtree(out) if overwrite else out.rmdir()
        os.replace(fresh, out)
        flush(out.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# Locks ------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, busy: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock that the system gives back however the process ends.

    Where the system or its file system knows no locks, nothing is held.

    Args:
        path: a folder that exists, or a file, which is made where it is missing.
        busy: the message for when another process holds the lock.
        patience_s: seconds to wait for that process.

    Raises:
        MorError: another process holds the lock; the message is ``busy``.
        OSError: ``path`` cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two processes at once are then the user's to avoid
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise MorError(busy) from None
                time.sleep(0.2)
            except OSError:  # a network file system without such locks
                break
        yield
    finally:
        os.close(handle)
