"""Our modelling code as flat files that import each other relatively.

Transformers loads code that lies beside the weights (``trust_remote_code``) from one flat folder,
and copies the files that it finds by lines of the form ``from .name import``. So every module that
the model needs becomes one file there, named by its path, and its imports are rewritten. Which
modules that are is read off the imports; the compiled kernels are replaced by their plain forms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mor
from mor.errors import MorError

ENTRIES = (
    *("mor.config.config", "mor.hf.modeling", "mor.hf.heads"),
    *("mor.hf.media", "mor.hf.next_frame"),
)
"""The modules of the classes that Transformers is pointed at."""

_ROOT = Path(mor.__file__).resolve().parent
_PLAIN = {"mor.ops.native": "mor.hf.export.plain_native"}
_NAMES = {"mor.config.config": "configuration_mor", "mor.hf.modeling": "modeling_mor"}
_HEADER = (
    f"# From mixture-of-recursions {mor.__version__}, module {{}}. Apache License 2.0.\n"
    "# Written by `mor export hf`; change it there, not here.\n"
)


def flat_name(module: str) -> str:
    """The name of a module's file, without ``.py``: letters, digits and underscores."""
    return _NAMES.get(module, module.replace(".", "_"))


def bundle(entries: tuple[str, ...] = ENTRIES) -> dict[str, str]:
    """The text of every file that ``entries`` need, by file name.

    Raises:
        MorError: a module imports in a form that cannot be rewritten.
    """
    files: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name in files:
            continue
        text = _path(_PLAIN.get(module, module)).read_text(encoding="utf-8")
        files[name], needed = _rewrite(module, text)
        waiting += needed
    return files


def _path(module: str) -> Path:
    """The file of a module of ours; it may not exist."""
    path = _ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _rewrite(module: str, text: str) -> tuple[str, list[str]]:
    """A module's text with flat imports, and the modules that it needs."""
    lines, needed = text.splitlines(), []
    for node in reversed(list(_our_imports(module, ast.parse(text)))):
        indent = " " * node.col_offset
        written = []
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            known = alias.asname or alias.name
            if _path(inner).exists():  # a module of a package, not a name in one
                needed.append(inner)
                flat = flat_name(inner)
                # The first line is for Transformers, which would not copy the file for the second.
                written.append(f"{indent}from .{flat} import __doc__ as _  # noqa: F401")
                written.append(f"{indent}from . import {flat} as {known}")
            else:
                needed.append(str(node.module))
                name = alias.name if known == alias.name else f"{alias.name} as {known}"
                written.append(f"{indent}from .{flat_name(str(node.module))} import {name}")
        assert node.end_lineno is not None
        lines[node.lineno - 1 : node.end_lineno] = written
    return _HEADER.format(module) + "\n".join(lines) + "\n", needed


def _our_imports(module: str, tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Every import of ours in a file, in order; only ``from mor.x import y`` can be rewritten."""
    for node in ast.walk(tree):
        plain = isinstance(node, ast.Import)
        if plain and any(alias.name.split(".")[0] == "mor" for alias in node.names):  # type: ignore[attr-defined]
            raise MorError(f"{module} imports mor as a whole; a flat folder has no such package")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mor":
            yield node
