"""Find twins: runs of equal code lines that stand in two places. ``make check`` refuses them.

    python tools/find_twins.py [--lines 8] [FOLDER ...]

Lines are compared as their tokens, so that spaces and comments do not matter. Imports, docstrings
and signatures are left out: a method that overrides another has to repeat its parameters.
Exit 1 where there are twins; each is printed with both places.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tokenize
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

LINES = 8
# Twins that may stay, by the two files, each with its reason.
ALLOWED: dict[tuple[str, str], str] = {}
_SPACE = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


@dataclass(frozen=True)
class Twin:
    """``length`` equal code lines: first lines in two files (1-based)."""

    first: tuple[Path, int]
    second: tuple[Path, int]
    length: int

    def __str__(self) -> str:
        places = " and ".join(f"{path}:{line}" for path, line in (self.first, self.second))
        return f"{self.length} equal lines: {places}"


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Line number and tokens of each line of code; what :mod:`find_twins` names is left out."""
    text = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text, str(path))):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Import | ast.ImportFrom) or is_text:
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: dict[int, list[str]] = defaultdict(list)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            line = token.start[0]
            if token.type not in _SPACE and token.string and line and line not in left_out:
                found[line].append(token.string)
    return [(line, " ".join(words)) for line, words in sorted(found.items())]


def find_twins(paths: list[Path], lines: int = LINES) -> list[Twin]:
    """Every longest run of at least ``lines`` equal code lines in two places of ``paths``."""
    code = [code_lines(path) for path in paths]
    starts: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, content in enumerate(code):
        texts = [text for _, text in content]
        for at in range(len(texts) - lines + 1):
            starts[tuple(texts[at : at + lines])].append((number, at))
    pairs = {
        (one, other)
        for places in starts.values()
        for index, one in enumerate(places)
        for other in places[index + 1 :]
        if one[0] != other[0] or other[1] - one[1] >= lines
    }
    twins = []
    for (file_a, at_a), (file_b, at_b) in sorted(pairs):
        if ((file_a, at_a - 1), (file_b, at_b - 1)) in pairs:
            continue  # the middle of a longer one
        length = lines
        while ((file_a, at_a + length - lines + 1), (file_b, at_b + length - lines + 1)) in pairs:
            length += 1
        first = paths[file_a], code[file_a][at_a][0]
        second = paths[file_b], code[file_b][at_b][0]
        twins.append(Twin(first, second, length))
    return twins


def main() -> int:
    """Print the twins; 1 where there are some."""
    parser = argparse.ArgumentParser(description="find runs of equal code lines")
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("src")])
    parser.add_argument("--lines", type=int, default=LINES, help="of a twin, at least")
    options = parser.parse_args()
    paths = sorted(path for folder in options.folders for path in folder.rglob("*.py"))
    twins = [
        twin
        for twin in find_twins(paths, options.lines)
        if (twin.first[0].as_posix(), twin.second[0].as_posix()) not in ALLOWED
    ]
    for twin in twins:
        print(twin)
    if twins:
        print(f"{len(twins)} twins; write what they share once", file=sys.stderr)
    return 1 if twins else 0


if __name__ == "__main__":
    sys.exit(main())
