"""A checkpoint is whole or absent; a damaged one is refused by name and the one before offered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from mor.errors import MorError
from mor.train import Recipe, train
from mor.train.loop import Loop
from mor.train.state import checkpoints
from mor.train.state import run_folder as folders
from tests.tiny import tiny_recipe
from tests.train.damage import FILES, cut, flip, kept, read, spying


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at 3, 6 and 8; read only."""
    output = tmp_path_factory.mktemp("finished")
    return train(tiny_recipe(data, output, save_steps=3, save_total_limit=9))


@pytest.fixture
def stopped(finished: Path, data: Path, tmp_path: Path) -> Recipe:
    """The same run, as if it had been killed after its last checkpoint."""
    recipe = tiny_recipe(data, tmp_path, save_steps=3, save_total_limit=9)
    shutil.copytree(finished, recipe.run_dir)
    shutil.rmtree(recipe.run_dir / "model")
    (recipe.run_dir / "summary.json").unlink()
    return recipe


# Damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_offered(name: str, harm: str, stopped: Recipe) -> None:
    path = kept(stopped) / "checkpoint-8" / name
    {"cut": cut, "flip": flip, "gone": Path.unlink}[harm](path)
    words = {"cut": r"has \d+ bytes, its manifest says", "flip": "sha256", "gone": "is missing"}
    with pytest.raises(
        MorError, match=rf"checkpoint-8 is damaged: {name} .*{words[harm]}"
    ) as caught:
        train(stopped, resume=True)
    assert str(caught.value).endswith("go on from there with --resume-from checkpoint-6")
    assert not (stopped.run_dir / "model").exists()


def test_the_offer_is_good(stopped: Recipe, finished: Path) -> None:
    cut(kept(stopped) / "checkpoint-8" / "optimizer.pt")
    train(stopped, resume_from="checkpoint-6")
    assert read(stopped.run_dir) == read(finished)
    # What was gone back over is out of the way, so that no later --resume meets it.
    assert [p.name for p in checkpoints.list_checkpoints(kept(stopped))] == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-8",
    ]
    assert checkpoints.damage(kept(stopped) / "checkpoint-8") is None
    assert (kept(stopped) / "aside" / "checkpoint-8" / "optimizer.pt").is_file()
    assert checkpoints.damage(kept(stopped) / "aside" / "checkpoint-8") is not None


def test_a_path_does_as_well(stopped: Recipe, finished: Path) -> None:
    train(stopped, resume_from=kept(stopped) / "checkpoint-3")
    assert read(stopped.run_dir) == read(finished)


def test_two_damaged_ones(stopped: Recipe) -> None:
    for step in (6, 8):
        flip(kept(stopped) / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(MorError, match="--resume-from checkpoint-3"):
        train(stopped, resume=True)
    with pytest.raises(MorError, match=r"checkpoint-6 is damaged: optimizer\.pt"):
        train(stopped, resume_from="checkpoint-6")
    assert len(checkpoints.list_checkpoints(kept(stopped))) == 3  # a refusal moves nothing
    cut(kept(stopped) / "checkpoint-3" / "model.safetensors")
    with pytest.raises(MorError, match="none before it is whole: start anew with --overwrite"):
        train(stopped, resume=True)


def test_a_manifest_that_cannot_be_read(stopped: Recipe) -> None:
    path = kept(stopped) / "checkpoint-8" / "manifest.json"
    for content in ("{", "[]", '{"files": {}}', '{"format": "mor-checkpoint", "files": {"a": 1}}'):
        path.write_text(content)
        with pytest.raises(MorError, match=r"manifest.json is damaged; .*checkpoint-6"):
            train(stopped, resume=True)
    known = json.loads((kept(stopped) / "checkpoint-6" / "manifest.json").read_text())
    path.write_text(json.dumps(known | {"version": 99}))
    with pytest.raises(MorError, match="has version 99; this mor reads version 1"):
        train(stopped, resume=True)


@pytest.mark.parametrize("name", ["checkpoint-7", "other/checkpoints/checkpoint-6", "6"])
def test_no_checkpoint_of_this_run(name: str, stopped: Recipe) -> None:
    with pytest.raises(
        MorError, match=r"no checkpoint of this run; .*: checkpoint-3, checkpoint-6, checkpoint-8"
    ):
        train(stopped, resume_from=name)


# Without a manifest: a plain Trainer's ---------------------------------------------------------


def test_without_a_manifest(stopped: Recipe, finished: Path) -> None:
    """Accepted with a warning where the files have the right form, else refused."""
    for step in (6, 8):
        (kept(stopped) / f"checkpoint-{step}" / "manifest.json").unlink()
    cut(kept(stopped) / "checkpoint-8" / "optimizer.pt")
    with pytest.raises(MorError, match=r"optimizer.pt is missing or cut short; .*checkpoint-6"):
        train(stopped, resume=True)
    with pytest.warns(UserWarning, match=r"checkpoint-6 has no manifest\.json"):
        train(stopped, resume_from="checkpoint-6")
    assert read(stopped.run_dir) == read(finished)


# Writing ---------------------------------------------------------------------------------------


def test_the_manifest_names_every_file(finished: Path) -> None:
    for checkpoint in checkpoints.list_checkpoints(finished / "checkpoints"):
        content = checkpoints.manifest(checkpoint)
        assert set(content["files"]) == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
        assert set(FILES) <= set(content["files"])
        assert content["step"] == checkpoints.step_of(checkpoint)
    assert not (finished / "checkpoints" / "saving").exists()


def test_what_a_killed_save_left_is_cleaned_up(stopped: Recipe, finished: Path) -> None:
    left = kept(stopped) / "saving"
    shutil.copytree(kept(stopped) / "checkpoint-8", left / "checkpoint-8")
    (left / "checkpoint-8" / "manifest.json").unlink()
    shutil.rmtree(kept(stopped) / "checkpoint-8")
    train(stopped, resume=True)
    assert not left.exists()
    assert read(stopped.run_dir) == read(finished)


def test_a_save_that_was_only_not_renamed_counts(
    stopped: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kept(stopped) / "saving").mkdir()
    (kept(stopped) / "checkpoint-8").rename(kept(stopped) / "saving" / "checkpoint-8")
    monkeypatch.setattr(Loop, "learn_micro_batch", None)  # nothing is left to train
    train(stopped, resume=True)
    assert checkpoints.step_of(checkpoints.list_checkpoints(kept(stopped))[-1]) == 8


def test_rotation_comes_after_the_new_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment of every save there is a whole checkpoint, with a limit of one too."""
    seen: list[list[int]] = []
    for name in ("rename", "unlink", "mkdir", "write_text"):
        monkeypatch.setattr(Path, name, spying(getattr(Path, name), tmp_path, seen))
    monkeypatch.setattr(shutil, "rmtree", spying(shutil.rmtree, tmp_path, seen))
    recipe = tiny_recipe(data, tmp_path, save_steps=2, save_total_limit=1)
    folder = train(recipe)
    began = next(i for i, steps in enumerate(seen) if steps)
    assert all(seen[began:])
    assert {step for steps in seen for step in steps} == {2, 4, 6, 8}
    assert [p.name for p in checkpoints.list_checkpoints(folder / "checkpoints")] == [
        "checkpoint-8"
    ]


def test_what_is_kept_for_good(data: Path, tmp_path: Path) -> None:
    """Out of the rhythm, beside the limit, and whatever the limit."""
    fields = {"save_steps": 2, "save_total_limit": 1, "keep_steps": [1], "keep_every": 3}
    folder = train(tiny_recipe(data, tmp_path, **fields))
    steps = [checkpoints.step_of(p) for p in checkpoints.list_checkpoints(folder / "checkpoints")]
    assert steps == [1, 3, 6, 8]


def test_keeping_without_a_rhythm(data: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(data, tmp_path, keep_steps=[5]))
    steps = [checkpoints.step_of(p) for p in checkpoints.list_checkpoints(folder / "checkpoints")]
    assert steps == [5]


def test_nothing_waits_to_be_folded_in(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What routers observe within a step is in no checkpoint: none may be left when one is made."""
    looked = []
    before = Loop.save

    def look(self: Loop, *args: Any, **kwargs: Any) -> None:
        looked.append(list(self.router.noted))
        before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "save", look)
    for router in ("threshold", "expert_choice", "token_choice"):
        fields = {"save_steps": 1, "eval_steps": 1, "budget": {"steps": 2}}
        train(tiny_recipe(data, tmp_path / router, router, **fields))
    assert len(looked) == 6
    assert not any(looked)


# One process at a time -------------------------------------------------------------------------


def test_two_processes_do_not_share_a_run(stopped: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PATIENCE_S", 0.0)
    with (
        folders.lock_run_folder(stopped.run_dir),
        pytest.raises(MorError, match="is being written by another process"),
    ):
        train(stopped, resume=True)
    train(stopped, resume=True)


def test_the_folder_stays_held_while_it_is_replaced(
    stopped: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PATIENCE_S", 0.0)
    before = Loop.learn_micro_batch

    def intrude(self: Loop, *args: Any, **kwargs: Any) -> Any:
        with (
            pytest.raises(MorError, match="another process"),
            folders.lock_run_folder(stopped.run_dir),
        ):
            pass
        return before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "learn_micro_batch", intrude)
    train(stopped, overwrite=True)
    shutil.rmtree(stopped.run_dir)
    train(stopped)


# Of earlier versions ---------------------------------------------------------------------------


def test_a_checkpoint_of_transformers_trainer(stopped: Recipe, finished: Path) -> None:
    """Versions before the loop was our own wrote through that Trainer: their runs go on.

    Beside our files such a checkpoint has a schedule and arguments, a state with the whole log,
    and rates in the optimiser's groups that were set for the next step.
    """
    shutil.rmtree(kept(stopped) / "checkpoint-8")
    old = kept(stopped) / "checkpoint-6"
    groups = torch.load(old / "optimizer.pt", weights_only=True)
    for group in groups["param_groups"]:
        group["lr"] = 123.0
    torch.save(groups, old / "optimizer.pt")
    torch.save({"last_epoch": 6, "base_lrs": [0.01, 0.01]}, old / "scheduler.pt")
    torch.save({"anything": 1}, old / "training_args.bin")
    state = TrainerState(global_step=6, max_steps=8, log_history=[{"loss": 1.0, "step": 6}])
    state.save_to_json(str(old / "trainer_state.json"))
    (old / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="has no manifest"):
        train(stopped, resume=True)
    assert read(stopped.run_dir) == read(finished)


def test_progress_that_cannot_be_read(stopped: Recipe) -> None:
    newest = kept(stopped) / "checkpoint-8"
    (newest / "manifest.json").unlink()
    (newest / "trainer_state.json").write_text('{"global_step": "eight"}')
    with (
        pytest.warns(UserWarning, match="has no manifest"),
        pytest.raises(MorError, match=r"trainer_state\.json is missing or damaged; .*resume-from"),
    ):
        train(stopped, resume=True)
