"""Any reporter of the Trainer by its switch, and a clear word where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from mor.errors import MorError
from mor.train import train
from mor.train.recipe.reporters import choose_reporters, known_reporters
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


class Tracker(GeneralTracker):
    """What one of Accelerate's trackers gets, in order."""

    name = "tracker"
    requires_logging_directory = False
    calls: ClassVar[list[Any]] = []

    def __init__(self, run_name: str) -> None:
        Tracker.calls = [run_name]

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        Tracker.calls.append("start")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        Tracker.calls.append((step, set(values)))

    def finish(self) -> None:
        Tracker.calls.append("finish")


def test_a_tracker_gets_every_entry(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tracker", Tracker)
    train(tiny_recipe(data, tmp_path, report_to=["tracker"], budget={"steps": 2}))
    project, started, one, two, scored, finished = Tracker.calls
    assert (project, started, finished) == ("mor", "start", "finish")
    assert [one[0], two[0], scored[0]] == [1, 2, 2]
    assert {"train/loss", "train/router/mean_depth", "train/epoch"} <= two[1]
    assert {"eval/loss", "eval/nll"} <= scored[1]


def test_a_tracker_is_finished_whatever_happens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tracker", Tracker)
    with pytest.raises(MorError, match="at step"):
        train(tiny_recipe(data, tmp_path, report_to=["tracker"], learning_rate=1e25))
    assert Tracker.calls[-1] == "finish"


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
    assert choose_reporters(None) == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_reporters(None) == []
    assert choose_reporters([]) == []
