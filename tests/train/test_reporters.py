"""Any reporter of the Trainer by its switch, and a clear word where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from mor.errors import MorError
from mor.train import train
from mor.train.recipe.reporters import known_reporters, reporters
from tests.tiny import tiny_recipe


class Recorder(TrainerCallback):
    """What a reporter gets: the run's arguments once, then every log entry."""

    names: list[str]
    entries: list[dict[str, Any]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Recorder.names, Recorder.entries = [args.run_name], []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        Recorder.entries.append(dict(logs))


def test_a_reporter_gets_every_entry(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    train(tiny_recipe(data, tmp_path, report_to=["recorder"], budget={"steps": 2}))
    assert Recorder.names == ["tiny"]
    steps = [entry for entry in Recorder.entries if "loss" in entry]
    assert len(steps) == 2
    assert {"lm_loss", "tokens_per_s", "mfu", "flops_per_s", "router/mean_depth"} <= set(steps[0])
    assert any("eval_loss" in entry for entry in Recorder.entries)


def test_the_trainers_names_are_known() -> None:
    assert {"tensorboard", "wandb", "mlflow", "trackio", "comet_ml"} <= set(known_reporters())


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_one_that_is_not_installed(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest)
    )
    with pytest.raises(MorError, match=rf"train\.report_to names {name}.*pip install {name}"):
        train(tiny_recipe(data, tmp_path, report_to=[name]))
    assert not list(tmp_path.iterdir())


def test_the_default_is_tensorboard_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reporters(None) == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reporters(None) == []
    assert reporters([]) == []
