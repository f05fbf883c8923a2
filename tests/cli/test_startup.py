"""``mor --help`` and its like load neither torch nor Transformers; ``import mor`` registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from mor.cli.app import app
from mor.cli.lazy import COMMANDS, load_command
from tests.strategies import make_model, small_config

HEAVY = ("torch", "transformers", "numpy", "yaml", "mor.config", "mor.train", "mor.hf")
# Runs the command, then says which heavy modules are loaded, and how many in all.
LIGHT = f"""
import sys, mor_command
sys.argv = ["mor", *sys.argv[1:]]
try:
    mor_command.main()
finally:
    print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
    print(len(sys.modules), file=sys.stderr)
"""


def run_python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["version"], ["recipes"], []])
def test_light_commands_load_nothing_heavy(words: list[str]) -> None:
    done = run_python(LIGHT, *words)
    *_, loaded, number = done.stderr.splitlines()
    assert loaded == "loaded:"
    assert int(number) < 600
    assert done.returncode == (0 if words else 2)


def test_the_module_is_as_light_as_the_command() -> None:
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mor.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "mor.cli.app" in loaded
    assert not loaded & set(HEAVY)
    assert "calibrate" in found.stdout


def test_help_lists_every_command_with_what_its_own_help_says() -> None:
    group = get_command(app)
    listed = {
        name: group.get_command(None, name).help  # type: ignore[attr-defined]
        for name in COMMANDS
    }
    real = {name: load_command(name).help.partition("\n\n")[0] for name in COMMANDS}
    assert listed == {name: " ".join(text.split()) for name, text in real.items()}
    assert all(load_command(name).name for name in ("train", "fold-table"))


def test_a_misspelt_command_is_corrected() -> None:
    done = run_python(LIGHT, "trian")
    assert done.returncode == 2
    assert "Did you mean 'train'" in done.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import mor\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport mor",
    ],
)
def test_import_mor_registers_in_either_order(order: str, tmp_path: Path) -> None:
    make_model(small_config("threshold")).save_pretrained(tmp_path)
    code = f"{order}\nprint(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)"
    names = "print(*[getattr(mor, name).__name__ for name in mor.__all__]); mor.nothing"
    done = run_python(f"{code}\n{names}")
    kind, _, public = done.stdout.partition("\n")
    assert kind == "MoRForCausalLM", done.stderr
    # Public names are where they were.
    assert public.split() == [
        *("ConfigError", "MoRBaseModel", "MoRCache", "MoRConfig"),
        *("MoRForAudioClassification", "MoRForCausalLM", "MoRForConditionalGeneration"),
        *("MoRForImageClassification", "MoRForNextFrame", "MoRForSequenceClassification"),
        *("MoRProcessor", "MorError", "preset"),
    ]
    assert "module 'mor' has no attribute 'nothing'" in done.stderr
