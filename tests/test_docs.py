"""README and docs: links lead somewhere, commands exist, the log and references are whole."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from mor.cli.app import app
from mor.config.fields import field_names
from mor.train.recipe.recipe import Recipe
from tools import check_release, log
from tools.docs.cli import cli_page, commands
from tools.docs.fields import config_page, recipe_page, sections

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code, where brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text("utf-8")))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them: a second equal one ends in -1."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    text = FENCE.sub("", path.read_text("utf-8"))
    for heading in re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE):
        anchor = log.slug(heading.replace("`", ""))
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def dead_links(path: Path) -> Iterator[str]:
    for match in LINK.finditer(prose(path)):
        target = match[1] or match[2]
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists() or not page.is_relative_to(ROOT):
            yield f"{name_of(path)}: {target} leads to no file"
        elif anchor and anchor not in anchors(page):
            yield f"{name_of(path)}: {target} leads to no heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One `two`\n\n# One two\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[a](b.md) [b](b.md#one-two) [c](b.md#one-two-1) [d](https://x.y) `[e](no)`\n"
        "```\n[f](no)\n```\n"
        '[g](no.md) [h](b.md#three) [i](#four) <img src="no.png"> [j](../c.md)\n'
    )
    found = [line.split()[1] for line in dead_links(page)]
    assert found == ["no.md", "b.md#three", "#four", "no.png", "../c.md"]


def test_readme_leads_to_the_places_one_looks_for() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    places = {
        "src/mor/train/loop.py": "def learn(",
        "src/mor/model/recursion.py": "def run_recursions(",
        "src/mor/engine/engine.py": "def step(",
        "src/mor/model/routers/boundary.py": "def decide(",
    }
    for path, what in places.items():
        assert f"]({path})" in text
        assert what in (ROOT / path).read_text("utf-8")
    assert len(text.splitlines()) <= 170


# Commands -----------------------------------------------------------------------------------------


def shell_lines(text: str) -> Iterator[str]:
    """The commands of the shell blocks of a page, without prompts, comments and line ends."""
    for match in FENCE.finditer(text):
        if match[2] in ("", "sh", "bash", "console"):
            for line in match[3].replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ ")


def mor_commands(text: str) -> Iterator[list[str]]:
    """The words after ``mor`` of every command line that calls it."""
    for line in shell_lines(text):
        if not re.match(r"(?:[A-Z_]+=\S* )*(?:torchrun .*-m mor\.cli |mor )", line):
            continue
        words = shlex.split(line, comments=True)
        start = words.index("mor.cli" if "mor.cli" in words else "mor") + 1
        ends = [i for i, word in enumerate(words) if word in ("|", "&&", ">", "&", "...")]
        yield words[start : ends[0] if ends else None]


def fault_of(words: list[str]) -> str | None:
    """What is wrong with a call of ``mor``: no such command, no such option; None if nothing is."""
    command: Any = get_command(app)
    context = command.context_class(command, info_name="mor")
    words, path = list(words), "mor"
    while hasattr(command, "list_commands"):
        if not words or words[0] not in command.list_commands(context):
            return f"{path} has no command {words[0] if words else ''!r}"
        path, (_, command, words) = f"{path} {words[0]}", command.resolve_command(context, words)
        context = command.context_class(command, info_name=path, parent=context)
    known = {opt for p in command.get_params(context) for opt in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"{path} has no option {word}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_exists(page: Path) -> None:
    calls = list(mor_commands(page.read_text("utf-8")))
    assert not [fault for words in calls if (fault := fault_of(words))]
    assert page.name != "README.md" or len(calls) >= 10


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_shell_block_can_be_parsed(page: Path) -> None:
    for match in FENCE.finditer(page.read_text("utf-8")):
        if match[2] in ("sh", "bash"):
            checked = subprocess.run(
                ["sh", "-n"], input=match[3], text=True, capture_output=True, check=False
            )
            assert checked.returncode == 0, f"{checked.stderr}\n{match[3]}"


def test_wrong_commands_are_found() -> None:
    text = (
        "```sh\nmor train a.yaml --resume  # goes on\nMOR_API_KEY=x mor serve d \\\n  --prot 1\n"
        "mor data prepar x\nmor evil\ntorchrun -m mor.cli train a --sett b=c\n"
        "pip install mor\n```\n"
    )
    faults = [fault_of(words) for words in mor_commands(text)]
    assert faults == [
        None,
        "mor serve has no option --prot",
        "mor data has no command 'prepar'",
        "mor has no command 'evil'",
        "mor train has no option --sett",
    ]


# The log ------------------------------------------------------------------------------------------


def test_the_log_is_dated_newest_first_with_its_index() -> None:
    text = log.LOG.read_text("utf-8")
    dates = [log.date_of(heading) for heading in log.headings(text)]
    assert len(dates) > 10
    assert dates == sorted(dates, reverse=True)
    assert log.arrange(text) == text, "run: python tools/log.py"


def test_the_log_is_put_in_order() -> None:
    head = "# Log\n\n<!-- index -->\n- gone\n\n"
    old = head + "## 2026-01-02 B\n\nb\n## 2026-03-01 C: c\n\nc\n## 2026-01-02 D\nd\n"
    new = log.arrange(old)
    assert log.headings(new) == ["2026-03-01 C: c", "2026-01-02 B", "2026-01-02 D"]
    assert "- [2026-03-01 C: c](#2026-03-01-c-c)\n" in new
    assert "gone" not in new
    assert log.arrange(new) == new
    with pytest.raises(ValueError, match="must look like"):
        log.arrange("<!-- index -->\n\n## Undated\n")
    with pytest.raises(ValueError, match="no line"):
        log.arrange("# Log\n\n## 2026-01-02 B\n")


# References ---------------------------------------------------------------------------------------


def test_the_reference_names_every_command_option_and_field() -> None:
    page = cli_page()
    for words, (command, context) in commands().items():
        assert f"\n## {words}\n" in page
        for parameter in command.get_params(context):
            assert parameter.name == "help" or parameter.opts[0] in page
    recipes = recipe_page()
    for path, section in sections(Recipe):
        _, heading, rest = recipes.partition(f"\n## {path or 'recipe'}\n")
        assert heading
        table = rest.partition("\n## ")[0]
        assert all(f"| `{name}` |" in table for name in section.model_fields)
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", config_page(), re.MULTILINE))
    assert rows.keys() == set(field_names()) - {"num_hidden_layers"}
    assert not [name for name, meaning in rows.items() if not meaning.strip()]


def test_every_page_has_its_place_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(named) == len(set(named))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(named)
    made = {"reference/cli.md", "reference/recipe.md", "reference/config.md"}
    made |= {"contributing.md", "changelog.md"}
    assert {name for name in named if not name.startswith("reference/api/")} == pages | made


# Releases -----------------------------------------------------------------------------------------


def test_a_release_needs_one_version_everywhere(tmp_path: Path) -> None:
    (tmp_path / "src" / "mor").mkdir(parents=True)
    (tmp_path / "src" / "mor" / "__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    changes = tmp_path / "CHANGELOG.md"
    changes.write_text(
        "## [Unreleased]\n\n## [1.2.3] - 2026-01-02\n\n- this\n\n## [1.2.2] - 2026-01-01\n- that\n"
    )
    assert check_release.problems("v1.2.3", tmp_path) == []
    assert check_release.notes("1.2.3", tmp_path) == "- this"
    assert len(check_release.problems("v1.2.4", tmp_path)) == 4
    assert "must look like" in check_release.problems("1.2.3", tmp_path)[0]
    changes.write_text("## [Unreleased]\n\n- this\n")
    (problem,) = check_release.problems("v1.2.3", tmp_path)
    assert "CHANGELOG.md has no section" in problem


def test_the_changelog_has_one_section_of_each_kind() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for version in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", version, re.MULTILINE)
        known = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert kinds == [kind for kind in known if kind in kinds]
