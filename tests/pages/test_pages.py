"""Every command and snippet of README and docs runs, in the cheapest honest form.

A command that trains is run with ``--dry-run``, one that serves up to the moment where it would
wait for requests, one that generates or measures on a handful of tokens; the names that pages use
stand for tiny models and texts (``world.py``). What needs a GPU, the network, hours or Ray has a
mark above its block, such as ``<!-- run: gpu -->``: it is not run, only parsed
(``tests/test_docs.py``). Blocks without a language are drawings and listings.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mor.engine import Engine
from mor.errors import MorError
from mor.folder.levels import Level, Levels
from mor.train import load_recipe
from tests.pages.page import ROOT, Block, Page, blocks, commands, tiny, write_recipe
from tests.pages.world import build_world
from tests.server.live import Live, serving

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if page.name != "LOG.md"]
SHELL, REASONS = ("sh", "bash", "console"), ("gpu", "network", "hours", "ray")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def live(world: Path) -> Iterator[Callable[[], Live]]:
    """A server of the tiny run, started by the first that asks for it."""
    with contextlib.ExitStack() as stack:
        started: list[Live] = []

        def get() -> Live:
            if not started:
                shares, none = (1.0, 0.6, 0.3), (0.0, 0.0, 0.0)
                levels = Levels((Level(0.25, shares, none), Level(1.5, shares, none)))
                engine = Engine(str(world / "runs/threshold"), max_num_seqs=4)
                started.append(stack.enter_context(serving(engine, levels=levels)))
            return started[0]

        yield get


class NeverServing:
    """Stands where ``mor serve`` would wait for requests."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def run(self, sockets: Any = None) -> None:
        pass


def marked(page: Path) -> list[Block]:
    return list(blocks(page.read_text("utf-8")))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own
@pytest.mark.filterwarnings("ignore::UserWarning")  # thinning is meant
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(b.language and not b.reason for b in marked(p))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_page_runs(
    page: Path,
    world: Path,
    live: Callable[[], Live],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Path(shutil.copytree(world, tmp_path / "here"))
    monkeypatch.chdir(here)
    monkeypatch.setattr("mor.server.make_server", NeverServing)
    monkeypatch.setattr("mor.report.style.DPI", 72)  # reports are looked at by nobody
    runner = Page(live, monkeypatch)
    todo = [block for block in marked(page) if not block.reason]
    for block in todo:
        if block.language == "yaml":
            write_recipe(block)
    for block in todo:
        where = f"{page.relative_to(ROOT)}:{block.line}"
        try:
            if block.language == "python":
                runner.python(tiny(block.text), where)
            elif block.language in SHELL:
                for words in commands(tiny(block.text)):
                    runner.shell(words)
        except Exception as error:
            raise AssertionError(f"{where}: {error}") from error
    # Recipes that no command of the page names are read too.
    for path in here.glob("*.yaml"):
        load_recipe(str(path))


def test_marks_are_known_and_every_command_is_in_a_block_that_says_so() -> None:
    seen = set()
    for page in PAGES:
        for block in marked(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            seen.add(block.reason)
            assert block.reason in ("", *REASONS), where
            assert block.language in ("", "python", "yaml", "json", *SHELL), where
            if not block.language:
                start = r"^\s*(?:\$ )?(?:mor|pip|torchrun|python\S*|curl|hf|make) [\w.-]"
                assert not re.search(start, block.text, re.M), f"{where}: a command without `sh`"
            if block.language == "python":
                compile(block.text, where, "exec")
    assert seen == {"", *REASONS}


def test_what_does_not_run_is_found(
    world: Path, live: Callable[[], Live], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "here"))
    runner = Page(live, monkeypatch)
    for wrong in (
        "mor eval runs/threshold --data nowhere",
        "mor train my-recipe.yaml --set train.no_such=1",
        "mor nothing",
        "rm -rf x",
        "make nothing",
        "pip install '.[nothing]'",
        "python examples/sft.py --no-such",
    ):
        (words,) = commands(wrong)
        with pytest.raises(AssertionError):
            runner.shell(words)
    with pytest.raises(NameError):
        runner.python("step", "x")
    with pytest.raises(MorError):
        write_recipe(Block(1, "yaml", "data: {path: x, packin: y}", "", ""))
    found = list(blocks("<!-- run: gpu -->\n```sh\na\n```\n```python\nb\n```\n"))
    assert [(block.language, block.reason) for block in found] == [("sh", "gpu"), ("python", "")]
