"""Compile the kernels once per machine, and load them.

Plain C functions over pointers, called through ctypes: PyTorch's headers would make two seconds of
compiling forty, and tie the result to one build of PyTorch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime has to be the one that is in the process)

from mor.checks import is_on
from mor.disk import replace_file

_SOURCES = (
    "native.cpp",
    "layer.h",
    "machine.h",
    "pointwise.h",
    "pass.h",
    "attention.h",
    "flash_backward.h",
    "flash.h",
    "blocks.h",
    "entries.h",
    "gemm8.h",
    "gemm.h",
    "micro.h",
    "vec.h",
)
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
# For some processors, AMD's above all, GCC multiplies and adds in two steps where sums are chained,
# but not in every form of a loop: a sum would hang on the rows beside it.
_GCC_FLAGS = ("--param=avoid-fma-max-bits=0",)


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be on a disk that several machines share."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _place(name: str) -> Path:
    """Where the library ``name`` is kept or to be put: in the cache, or for this process alone."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base or Path("~/.cache").expanduser()) / "mor" / "native"
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # a read-only home, that of another user, or none at all
        folder = Path(tempfile.mkdtemp(prefix="mor-native-"))
    return folder / name


def _build(compiler: str) -> Path:
    """The compiled library; made if it is not there.

    Raises:
        RuntimeError: what the compiler said.
    """
    here = Path(__file__).parent
    option = "-mcpu" if platform.machine() in ("arm64", "aarch64") else "-march"
    machine = f"{option}={os.environ.get('MOR_NATIVE_MARCH') or 'native'}"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    flags = [*_FLAGS, *(() if "clang" in version.stdout else _GCC_FLAGS), machine]
    command = [compiler, *flags, str(here / _SOURCES[0])]
    key = hashlib.sha256("\0".join([*flags, version.stdout, _processor()]).encode())
    for name in _SOURCES:
        key.update((here / name).read_bytes())
    target = _place(f"kernels-{key.hexdigest()[:16]}.so")
    if target.is_file():
        return target
    with replace_file(target, contended=True) as made:
        compiling = [*command, "-o", str(made)]
        done = subprocess.run(compiling, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip()[-2000:])
    return target


@cache
def _load() -> tuple[ctypes.CDLL | None, str, Path | None]:
    if not is_on("MOR_NATIVE", True):
        return None, f"MOR_NATIVE={os.environ['MOR_NATIVE']} turns them off", None
    if sys.platform == "win32":
        return None, "they need GCC or Clang with OpenMP; Windows has plain forms only", None
    compiler = _compiler()
    if compiler is None:
        return None, "no C++ compiler found (g++, clang++, or CXX)", None
    try:
        built = _build(compiler)
        return ctypes.CDLL(str(built)), "", built
    except (OSError, RuntimeError) as error:
        why = f"{compiler} could not build them: {error}"
        warnings.warn(
            f"the CPU runs plain PyTorch, several times slower; {why}", RuntimeWarning, stacklevel=2
        )
        return None, why, None


def processor() -> str:
    """Name of the processor's model; empty where the system does not say."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor()


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    return _load()[0]


def library_file() -> Path | None:
    """Where they lie; the name stands for sources, compiler and instruction set."""
    return _load()[2]


def missing() -> str:
    """Why there are none; empty where there are."""
    return _load()[1]
