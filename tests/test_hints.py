"""What to install is said in one place, in words that work in a checkout and in every shell."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from mor.errors import install_hint, missing_package

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def test_the_hint_names_the_checkout_quoted_for_zsh() -> None:
    assert install_hint("report") == "pip install -e '.[report]' in a checkout of mor"
    said = str(missing_package("plots need", "matplotlib", "report"))
    assert (
        said
        == f"plots need the package matplotlib, which is not installed: {install_hint('report')}"
    )


def test_every_extra_that_a_message_names_exists() -> None:
    calls = r"(?:install_hint|missing_package)\((?:[^()]|\([^()]*\))*[\"'](\w+)[\"']\)"
    named = {
        extra
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(calls, path.read_text("utf-8"))
    }
    assert {"report", "serve", "data", "gguf"} <= named <= set(EXTRAS)


@pytest.mark.parametrize("folder", ["src", "docs", "examples", "tests", "README.md", "tools"])
def test_nothing_is_said_to_come_from_an_index_before_there_is_a_release(folder: str) -> None:
    root = ROOT / folder
    files = [root] if root.is_file() else [p for p in root.rglob("*") if p.suffix in (".py", ".md")]
    texts = {
        p: p.read_text("utf-8") for p in files if p.name not in ("LOG.md", Path(__file__).name)
    }
    wrong = re.compile(r"""pip install\s+["']?(?:mor|mixture-of-recursions)\b""")
    assert not [
        path for path, text in texts.items() if wrong.search(text) and "test_docs" not in path.name
    ]
    # zsh takes unquoted brackets for a pattern.
    bare = re.compile(r"pip install [^'\"`\n]*\.\[")
    assert not [path for path, text in texts.items() if bare.search(text)]
    own = re.compile(r"pip install -e '")
    if folder == "src":
        assert [path.name for path, text in texts.items() if own.search(text)] == ["errors.py"]


def test_git_ignores_what_the_commands_of_the_pages_write() -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    pages = [ROOT / "README.md", *(p for p in (ROOT / "docs").rglob("*.md") if p.name != "LOG.md")]
    written = re.compile(r"(?:--out|--local-dir|output[=:]) *([a-z][\w./-]*)")
    named = {found for page in pages for found in written.findall(page.read_text("utf-8"))}
    named |= {"source/model.safetensors", "report/index.html", "models/x/config.json"}
    assert {"report", "runs", "models/folded", "data/mine"} <= named
    # With something in it: a folder's rule says nothing about a name that is not there yet.
    paths = [f"{name}/x" for name in sorted(named)]
    done = subprocess.run(
        [git, "-C", str(ROOT), "check-ignore", *paths], capture_output=True, text=True, check=False
    )
    assert set(paths) == set(done.stdout.split())
