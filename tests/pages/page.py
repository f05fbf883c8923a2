"""A page of the documents, and what runs its blocks."""

from __future__ import annotations

import contextlib
import glob
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mor.cli import main
from mor.ops import native
from mor.train import parse_recipe
from mor.train.recipe.file import apply_overrides
from tests.server.live import Live
from tests.tiny import tiny_fields

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- run: ([\w ]+) -->\n)?^( *)```(\w*)\n(.*?)^\2```", re.M | re.S)
# Large numbers of the pages, and names that stand for the reader's own.
TINY = {
    "prepare shakespeare": "prepare texts --vocab-size 300 --validation-fraction 0.1",  # no network
    "documents=500000": "documents=60",
    "validation-fraction 0.004": "validation-fraction 0.2",
    "checkpoint-500": "checkpoint-1",
    ", 2048, order_seed": ", 16, order_seed",
    "64 * 10_000": "8 * 2",
    "64 * step": "8 * step",
    "per_step=64": "per_step=8",
    "batch_size=64": "batch_size=8",
}
# What makes a command short; the last of two equal options counts.
SHORT = {
    "train": ["--dry-run"],
    "uptrain": ["--dry-run"],
    "curves": ["--max-sequences", "2", "--capacities", "1"],
    "analyse": ["--max-sequences", "2"],
    "study": ["--dry-run"],
    "generate": ["--max-new-tokens", "2"],
    "calibrate": ["--max-sequences", "4"],
    "eval": ["--max-sequences", "4"],
    "fold-table": ["--max-tokens", "32", "--seq-len", "16", "--init", "step", "--sharing", "cycle"],
    "card": ["--max-sequences", "1"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``reason`` says why it is not run, empty where it is."""

    line: int
    language: str
    text: str
    reason: str
    before: str


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(4)) + 1
        yield Block(line, match[3], match[4], match[1] or "", text[: match.start()][-300:])


def tiny(text: str) -> str:
    for large, small in TINY.items():
        text = text.replace(large, small)
    return re.sub(r"\bRUN\b", "runs/threshold", text)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, ``for`` loops unrolled, patterns of names filled in."""
    text = text.replace("\\\n", " ")
    loops = re.compile(r"for (\w+) in ([^;]*); do\n(.*?)\ndone", re.S)
    text = loops.sub(
        lambda m: "\n".join(m[3].replace(f"${m[1]}", each) for each in m[2].split()), text
    )
    text = re.sub(r"'\s*\n\s*(?=-d )", "' ", text)
    for line in text.splitlines():
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        if words:
            # A word with blanks was quoted, so that its star is no pattern.
            patterns = ["*" in word and " " not in word for word in words]
            filled = [
                sorted(glob.glob(word)) if pattern else [word]
                for word, pattern in zip(words, patterns, strict=True)
            ]
            yield [one for several in filled for one in several]


class Page:
    """Runs the blocks of one page in the present folder."""

    def __init__(self, live: Callable[[], Live], patch: pytest.MonkeyPatch) -> None:
        self.live, self.patch = live, patch
        self.names: dict[str, Any] = {"__name__": "page"}

    def shell(self, words: list[str]) -> None:
        """One command; those that are not ours are checked as far as they concern us."""
        if words[0] == "torchrun":
            words = ["mor", *words[words.index("mor.cli") + 1 :]]
        known: dict[str, Callable[[list[str]], None]] = {
            "mor": self.mor,
            "make": self.make,
            "pip": self.pip,
            "python": self.script,
            "curl": self.curl,
            ".": lambda words: None,
        }
        assert words[0] in known, f"nothing runs {words[0]!r}; mark the block with its reason"
        known[words[0]](words[1:])

    def mor(self, words: list[str]) -> None:
        """A command of ours, in this process, to its end."""
        words = [*words, *SHORT.get(words[0], [])]
        if "--leave-out" in words:
            words = words[:-4]
        if words[0] == "serve" and native.library() is None and "--quantization" in words:
            return
        self.patch.setattr(sys, "argv", ["mor", *words])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert not ended.value.code, f"mor {shlex.join(words)}\n{out.getvalue()}{err.getvalue()}"

    def make(self, words: list[str]) -> None:
        """Targets exist."""
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for word in words:
            assert "=" in word or re.search(rf"^{word}:.*## ", makefile, re.M), word

    def pip(self, words: list[str]) -> None:
        """Extras exist."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        for word in words[1:]:
            named = re.fullmatch(r"\.\[([\w,]+)\]", word)
            if named:
                assert set(named[1].split(",")) <= set(project["optional-dependencies"])

    def script(self, words: list[str]) -> None:
        """A script of ours exists and has these options (``tests/train/test_examples.py`` runs)."""
        text = (ROOT / words[0]).read_text("utf-8")
        assert not [word for word in words if word.startswith("--") and f'"{word}"' not in text]

    def curl(self, words: list[str]) -> None:
        """The request, sent to a real server."""
        place = next(word for word in words if word.startswith("localhost:8000"))
        body = json.loads(words[words.index("-d") + 1]) | {"model": "tiny", "max_tokens": 2}
        url = place.replace("localhost:8000", self.live().url)
        assert httpx.post(url, json=body, timeout=60).status_code == 200

    def python(self, text: str, where: str) -> None:
        """A snippet, with the names of those before it on the page."""
        if "localhost:8000" in text:
            text = text.replace("http://localhost:8000", self.live().url)
            text = re.sub(r'model="\w+"', 'model="tiny"', text)
            text = re.sub(r"max_tokens=\d+", "max_tokens=2", text)
        text = re.sub(r"max_(new_)?tokens=\d+", r"max_\1tokens=2", text)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(text, where, "exec"), self.names)


def write_recipe(block: Block) -> None:
    """Put a recipe of the page into its file; a part of one has to fit into another's."""
    fields = apply_overrides({}, [f"page={block.text}"])["page"]  # read as recipes are
    if "name" not in fields:
        whole = tiny_fields(Path("data/shakespeare"), Path("runs"))
        del whole["model"]["max_position_embeddings"]
        if "data" in fields:
            whole["data"] = fields["data"]
        whole["train"] |= fields.get("train", {})
        parse_recipe(whole)
        return
    named = re.findall(r"`([\w-]+\.yaml)`", block.before)
    Path(named[-1] if named else f"{fields['name']}.yaml").write_text(block.text, encoding="utf-8")
