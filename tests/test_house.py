"""The house itself: pins, dependencies and documents agree with each other and with the code."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import mor
from tests.walks import ROOT, project_files, text_of

SOURCE = ROOT / "src" / "mor"

# Put together from parts, so that this file does not find itself.
REGISTRY_HOSTS = re.compile(
    r"(?:^|[^\w.])(?:[\w-]+\.)*(?:"
    + "|".join(
        name.replace("_", r"\.")
        for name in ("pypi_org", "pythonhosted_org", "download_pytorch_org", "pypi_python_org")
    )
    + r")\b",
    re.IGNORECASE,
)
MACHINE_PATHS = re.compile(
    r"(?<![\w.$~}\-/])/(?:" + "work|root|opt|home|Users|tmp/scr" + r"atch)/\w"
)

# The name one imports where it is not the name one installs.
IMPORT_NAMES = {
    "flashinfer-python": "flashinfer",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "backports-zstd": "backports",
}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by canonical name, without references to our own extras."""
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(r.name): r
        for r in parsed
        if canonicalize_name(r.name) != "mixture-of-recursions"
    }


def core(project: dict[str, Any]) -> dict[str, Requirement]:
    return requirements(project["project"]["dependencies"])


def extras(project: dict[str, Any]) -> dict[str, dict[str, Requirement]]:
    groups = project["project"]["optional-dependencies"]
    return {name: requirements(lines) for name, lines in groups.items()}


def pins(file: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    return requirements([line for line in lines if line.strip() and not line.startswith("#")])


def pin_of(name: str, file: str) -> Version:
    return Version(next(iter(pins(file)[name].specifier)).version)


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    files = project_files()
    assert {ROOT / "pyproject.toml", SOURCE / "errors.py", ROOT / ".ci" / "run"} <= set(files)
    found = []
    for path in files:
        for number, line in enumerate((text_of(path) or "").splitlines(), 1):
            if REGISTRY_HOSTS.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "line", "hit"),
    [
        (REGISTRY_HOSTS, "get it from https://pypi." + "org/simple", True),
        (REGISTRY_HOSTS, "files.pythonhosted." + "org", True),
        (REGISTRY_HOSTS, "the organisation of pypi", False),
        (MACHINE_PATHS, "open('/" + "home/ada/notes.txt')", True),
        (MACHINE_PATHS, "cd /tmp/scr" + "atch/x", True),
        (MACHINE_PATHS, "see .github/work" + "flows/ci.yml", False),
        (MACHINE_PATHS, "~/.cache/mor and $ROOT/home/x", False),
        (MACHINE_PATHS, "make setup PYTHON=/path/to/python3.12", False),
    ],
)
def test_the_patterns_find_what_they_should(pattern: re.Pattern[str], line: str, hit: bool) -> None:
    assert bool(pattern.search(line)) is hit


def test_every_dependency_has_its_line_and_no_line_is_stale(project: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    documented = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(documented) == len(set(documented)), "a package has two lines"
    wanted = set(core(project)).union(*extras(project).values())
    assert {canonicalize_name(name) for name in documented} == wanted


def test_pins_are_exact_and_allowed_by_the_project(project: dict[str, Any]) -> None:
    pinned = pins()
    for name, requirement in pinned.items():
        assert re.fullmatch(r"==[\w.!]+", str(requirement.specifier)), (
            f"{name} is not pinned to one"
        )
        assert requirement.url is None, f"{name} names an address"
    assert str(pinned["torch"].specifier) == "==2.13.0"

    installed_by_make = core(project)
    for extra in ("dev", "data", "docs", "finetune", "report", "serve", "tensorboard"):
        installed_by_make |= extras(project)[extra]
    for name, requirement in installed_by_make.items():
        assert name in pinned, f"{name} has no pin in constraints.txt"
        version = Version(next(iter(pinned[name].specifier)).version)
        assert requirement.specifier.contains(version), (
            f"{name}: {version} is outside {requirement}"
        )


def test_the_oldest_pins_are_the_lower_bounds(project: dict[str, Any]) -> None:
    """What the project says it runs on is what `make test-oldest` runs on, to the minor version."""
    file = "constraints-oldest.txt"
    bounds = core(project)
    for extra in ("data", "finetune", "gguf", "tensorboard"):
        bounds |= extras(project)[extra]
    for name, requirement in bounds.items():
        (lower,) = (s.version for s in requirement.specifier if s.operator == ">=")
        pinned = pin_of(name, file)
        assert requirement.specifier.contains(pinned), f"{name}: {pinned}"
        assert pinned.release[:2] == (*Version(lower).release, 0)[:2], f"{name}: {pinned}, {lower}"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"OLDEST_TORCH  ?= {pin_of('torch', file)}\n" in makefile


def test_the_dev_extra_brings_the_extras_that_the_tests_use(project: dict[str, Any]) -> None:
    own = [
        Requirement(line)
        for line in project["project"]["optional-dependencies"]["dev"]
        if canonicalize_name(Requirement(line).name) == "mixture-of-recursions"
    ]
    assert {extra for requirement in own for extra in requirement.extras} == {
        "analyse",
        "data",
        "docs",
        "finetune",
        "gguf",
        "grammar",
        "media",
        "report",
        "serve",
        "tensorboard",
    }


def test_version_is_one(project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    assert mor.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_python_range_is_the_same_everywhere(project: dict[str, Any]) -> None:
    allowed = SpecifierSet(project["project"]["requires-python"])
    versions = [f"3.{minor}" for minor in range(8, 20) if allowed.contains(f"3.{minor}")]
    assert versions == ["3.11", "3.12", "3.13"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    matrix = re.search(r"python: \[(.*)\]", workflow)
    assert matrix
    assert re.findall(r"[\d.]+", matrix[1]) == versions
    classifiers = project["project"]["classifiers"]
    assert [c for c in classifiers if "Python :: 3." in c] == [
        f"Programming Language :: Python :: {version}" for version in versions
    ]
    setup = (ROOT / "tools" / "setup.sh").read_text("utf-8")
    assert "(3, 11) <= sys.version_info[:2] < (3, 14)" in setup
    assert default_environment()["python_version"] in versions


def test_ci_runs_the_two_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text("utf-8").splitlines()]
    commands = [line for line in lines if line.startswith("make ")]
    assert commands[:4] == ["make setup", "make check", "make test", "make package"]
    assert commands[4:] == ["make -o package smoke || passed=no"]
    torch = f"OLDEST_TORCH={pin_of('torch', 'constraints.txt')}"
    # What runs beside another step is waited for, so that its failure is one of the script.
    beside = [line.removeprefix("beside ") for line in lines if line.startswith("beside ")]
    assert beside == [
        f'oldest make -C "$tree" test-oldest {torch} WORKERS=1',
        "chromium sh tools/get_browser.sh",
        "docs make docs",
        "browser make test-browser",
    ]
    awaited = [line for line in lines if line.startswith("await ")]
    assert awaited == [
        "await docs",
        "await oldest",
        "await chromium || true",
        "await browser || passed=no",
    ]
    assert any(line.startswith('[ "$passed" = yes ] ||') and "exit 1" in line for line in lines)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    assert "run: .ci/run" in workflow
    assert "run: make test-oldest OLDEST_PYTHON=python" in workflow


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports, at any indentation, our own and Python's left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"mor"}


def test_every_import_is_a_declared_dependency(project: dict[str, Any]) -> None:
    def import_names(group: dict[str, Requirement]) -> set[str]:
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in group}

    groups = extras(project)
    allowed = import_names(core(project))
    extras_of_room = {
        "data": ["data", "media"],
        "ops": ["gpu"],
        "report": ["report"],
        "server": ["serve", "grammar", "ray"],
        "eval": ["eval", "analyse"],
        "hf": ["gguf", "media"],
        "train": ["tensorboard"],
    }
    undeclared = []
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0]
        more = set().union(*(import_names(groups[e]) for e in extras_of_room.get(room, ())))
        undeclared += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in sorted(imported_packages(path) - allowed - more)
        ]
    assert not undeclared, "\n".join(undeclared)


def test_the_package_says_that_it_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_the_licence_is_there_word_for_word(project: dict[str, Any]) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    for name in project["project"]["license-files"]:
        assert (ROOT / name).is_file()
    # The digest of the text that the Apache Software Foundation publishes.
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )
