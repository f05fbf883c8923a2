"""Read members of package archives: Debian's `.deb` and npm's `.tgz`.

A `.deb` is an `ar` archive that holds a tar archive of the files (deb(5)); reading it here
means that the system needs no `dpkg`.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from mor.errors import MorError

_AR_MAGIC = b"!<arch>\n"


def read_members(path: Path, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield the files in a `.deb`, `.tgz` or `.tar.gz` whose whole path matches, in its order.

    Args:
        path: the archive.
        pattern: a regular expression for paths without a leading `./`.

    Raises:
        MorError: the archive cannot be read, or holds no such file.
    """
    found = False
    try:
        data = _data_of_deb(path) if path.suffix == ".deb" else path.read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
            for member in tar:
                match = re.fullmatch(pattern, member.name.removeprefix("./"))
                stream = tar.extractfile(member) if match and member.isfile() else None
                if match and stream is not None:
                    found = True
                    yield match, stream.read()
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise MorError(f"cannot read the archive {path}: {error}") from error
    if not found:
        raise MorError(f"the archive {path} holds no file {pattern}")


def _data_of_deb(path: Path) -> bytes:
    """The tar archive inside a `.deb`, decompressed only where Python's tarfile cannot do it."""
    raw = path.read_bytes()
    if not raw.startswith(_AR_MAGIC):
        raise MorError(f"cannot read the archive {path}: it is no Debian package")
    place = len(_AR_MAGIC)
    while place + 60 <= len(raw):
        header = raw[place : place + 60]
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        try:
            size = int(header[48:58])
        except ValueError:
            break
        content = raw[place + 60 : place + 60 + size]
        if name.startswith("data.tar"):
            if len(content) < size:
                raise MorError(f"cannot read the archive {path}: it is cut short")
            return _unpack_zstd(content, path) if name.endswith(".zst") else content
        place += 60 + size + size % 2
    raise MorError(f"cannot read the archive {path}: it holds no data.tar")


def _unpack_zstd(content: bytes, path: Path) -> bytes:
    try:
        from backports import zstd
    except ImportError as error:
        from mor.data.extras import need_extra

        raise need_extra(f"packages such as {path.name}", "backports.zstd") from error
    data: bytes = zstd.decompress(content)
    return data
