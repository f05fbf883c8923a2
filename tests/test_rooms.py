"""The rooms of the house: no circles, no long files, no twins, nobody else's private parts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "mor"
FILES = sorted(SOURCE.rglob("*.py"))

# Every file of Python in these is one room.
FOLDERS = ("src", "tests", "benchmarks", "tools", "examples")
MOST_LINES = 300
# What Transformers asks a model class to define: its guides name these, private as they look.
HOOKS = {
    "_init_weights",
    "_keys_to_ignore_on_load_unexpected",
    "_keep_in_fp32_modules_strict",
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_supports_sdpa",
    "_tied_weights_keys",
}
# Names that begin with an underscore and belong to others, each with its reason.
OTHERS = {
    ("bench/worker/openvino.py", "_exit"): "os._exit is documented",
    **dict.fromkeys(
        (
            ("bench/rates.py", name)
            for name in (
                "_mkl_linear",
                "_mkl_reorder_linear_weight",
                "_linear_pointwise",
                "_reorder_linear_weight",
            )
        ),
        "operators without a public name; a bound is measured with them, nothing runs on them",
    ),
    **dict.fromkeys(
        (
            ("ops/prefix.py", f"_scaled_dot_product_flash_attention_for_cpu{end}")
            for end in ("", "_backward")
        ),
        "operators without a public name; tests hold them equal to the plain form",
    ),
}

# Modules that need a package which is left out now and then: looked into where it is there.
EXTRA = {
    "eval/harness/lm.py": "lm_eval",
    "ops/fused.py": "triton",
    "ops/paged/kernel.py": "triton",
    **{f"server/ray/{name}.py": "ray" for name in ("application", "deploy", "launch", "router")},
}


def can_import(path: Path) -> bool:
    package = EXTRA.get(name_of(path))
    return package is None or importlib.util.find_spec(package) is not None


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def module_of(path: Path) -> str:
    parts = ("mor", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def trees() -> dict[str, ast.Module]:
    return {module_of(path): ast.parse(path.read_text("utf-8"), str(path)) for path in FILES}


def imported(tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it and for types alone too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules
            if names - modules:
                found.add(node.module)
    return found & modules


def test_no_circle_of_imports() -> None:
    code = trees()
    arrows = {name: imported(tree, set(code)) - {name} for name, tree in code.items()}
    while leaves := {name for name, others in arrows.items() if not others}:
        arrows = {name: others - leaves for name, others in arrows.items() if name not in leaves}
    # What is left leads into a circle; from its far side, what nobody imports is in none.
    while True:
        wanted = set().union(*arrows.values()) if arrows else set()
        if wanted >= set(arrows):
            break
        arrows = {name: others for name, others in arrows.items() if name in wanted}
    assert not arrows, f"modules import each other in a circle: {arrows}"


def test_no_file_is_long() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in files}
    assert len(lines) > len(FILES)
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: {long}"


def test_training_shows_few_rooms_at_its_top() -> None:
    rooms = {path.stem for path in (SOURCE / "train").glob("*.py")} - {"__init__"}
    rooms |= {path.parent.name for path in (SOURCE / "train").glob("*/__init__.py")}
    assert len(rooms) <= 15, sorted(rooms)


def test_there_are_no_twins() -> None:
    tool = load_tool("find_twins")
    assert [str(twin) for twin in tool.find_twins(FILES)] == []


TWIN = '''
def {name}(a, b):
    """{text}"""
    one = a + b
    two = a - b  # {text}
    three = a * b
    four = (
        one,  two
    )
    return one, two, three, four
'''


def test_twins_are_found_whatever_their_words(tmp_path: Path) -> None:
    tool = load_tool("find_twins")
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("import os\n" + TWIN.format(name="f", text="This."), "utf-8")
    second.write_text(TWIN.format(name="g", text="That, in other words."), "utf-8")
    (twin,) = tool.find_twins([first, second], 7)
    assert (twin.first, twin.second, twin.length) == ((first, 5), (second, 4), 7)
    assert tool.find_twins([first, second], 8) == []
    first.write_text(first.read_text("utf-8").replace("a * b", "a @ b"), "utf-8")
    assert tool.find_twins([first, second], 7) == []


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Others' private parts ---------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_privates(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, variables, attributes of its own objects."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def reached_privates(tree: ast.Module, everywhere: set[str]) -> Iterator[str]:
    """Private attributes that are not the file's own.

    Of ``self`` and ``cls`` they may be defined in any file of ours (a base class); of another
    object only in the same file.
    """
    here = defined_privates(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        through_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
        if through_super or node.attr not in (here | everywhere if own else here):
            yield node.attr


def test_nothing_reaches_into_the_private_parts_of_others() -> None:
    code = trees()
    everywhere = set().union(*map(defined_privates, code.values()))
    found = {
        (name_of(path), name)
        for path in FILES
        for name in reached_privates(code[module_of(path)], everywhere)
    }
    assert {pair for pair in found if pair[1] not in HOOKS} == set(OTHERS)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("class A(B):\n    def f(self):\n        return self._tr_loss", ["_tr_loss"]),
        ("class A(B):\n    def _f(self):\n        return super()._f()", ["_f"]),
        ("trainer._load_rng_state(x)", ["_load_rng_state"]),
        ("class A:\n    def g(self):\n        self._x = 1\n        return copy(self)._x", []),
        ("class A(B):\n    def f(self):\n        return self._ours", []),
        ("other._ours", ["_ours"]),
        ("_ = tree.__class__", []),
    ],
)
def test_the_search_finds_what_it_should(code: str, found: list[str]) -> None:
    assert list(reached_privates(ast.parse(code), {"_ours", "_f"})) == found


def test_no_private_method_of_others_is_overridden() -> None:
    found = set()
    for path in FILES:
        if path.name == "__main__.py" or not can_import(path):
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.bases:
                kind = getattr(importlib.import_module(module_of(path)), node.name)
                found |= {(name_of(path), name) for name in overridden(kind, node)}
    assert {pair for pair in found if pair[1] not in HOOKS} <= set(OTHERS)


def overridden(kind: type, node: ast.ClassDef) -> Iterator[str]:
    """Private names of a class body that a class of somebody else, among its bases, has too."""
    body = ast.Module([*node.body], [])
    for name in defined_privates(body):
        for base in kind.__mro__[1:]:
            others = not base.__module__.partition(".")[0].startswith("mor")
            if others and name in vars(base):
                yield name


def test_overridden_names_are_seen() -> None:
    code = "import json\nclass A(json.JSONEncoder):\n    def _private(self): ..."
    (node,) = [n for n in ast.parse(code).body if isinstance(n, ast.ClassDef)]
    base = type("Base", (), {"_private": None, "__module__": "transformers.trainer"})
    assert list(overridden(type("A", (base,), {}), node)) == ["_private"]
    ours = type("Base", (), {"_private": None, "__module__": "mor.model.model"})
    assert list(overridden(type("A", (ours,), {}), node)) == []


# Docstrings --------------------------------------------------------------------------------------


def test_public_methods_have_docstrings_unless_they_override() -> None:
    """An override does what the method above it says; the linter cannot know which these are."""
    bare = []
    for path in FILES:
        if path.name == "__main__.py" or not can_import(path):
            continue
        module = importlib.import_module(module_of(path))
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not is_private(node.name):
                kind = getattr(module, node.name)
                bare += [
                    f"{name_of(path)}: {node.name}.{name}" for name in undocumented(kind, node)
                ]
    assert not bare, "\n".join(bare)


def undocumented(kind: type, node: ast.ClassDef) -> Iterator[str]:
    """Public methods of a class body without a docstring that no base class has."""
    for method in node.body:
        if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        new = not any(method.name in vars(base) for base in kind.__mro__[1:])
        setter = any(ast.unparse(one).endswith(".setter") for one in method.decorator_list)
        if new and not setter and method.name[0] != "_" and ast.get_docstring(method) is None:
            yield method.name
