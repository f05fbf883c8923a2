"""Make a folder whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mor.errors import MorError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a new hidden folder to write into; on success it replaces `target` in one rename.

    On any exception, an interrupt included, it is removed and `target` stays as it was.

    Raises:
        MorError: something could not be written; the message names `target`.
    """
    final = target.resolve()
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            _replace_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise MorError(f"cannot write {target}: {error.strerror or error}") from error


def _replace_folder(new: Path, final: Path) -> None:
    old = new.with_suffix(".old")
    replaces = final.is_dir()
    if replaces:
        final.rename(old)
    try:
        new.rename(final)
    except BaseException:
        if replaces:
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)
