"""A full disk, no memory, a number that is none: a clear stop, the last good state kept."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mor.errors import MorError
from mor.train import Recipe, guards, train
from mor.train.loop import Loop
from mor.train.objective import LossParts, NextToken
from mor.train.optimiser import Optimiser
from mor.train.state import checkpoints
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.slow


def kept(recipe: Recipe) -> list[int]:
    return [
        checkpoints.step_of(p) for p in checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")
    ]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def fields(**more: Any) -> dict[str, Any]:
    return {"save_steps": 2, "save_total_limit": 2} | more


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Weights of the run that nothing disturbs."""
    return weights(train(tiny_recipe(data, tmp_path_factory.mktemp("whole"), **fields())))


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Recipe:
    return tiny_recipe(data, tmp_path, **fields())


def once_at(
    step: int, target: Any, name: str, act: Any, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Before the ``name`` of a trainer's ``step`` (done so far), once: do ``act``."""
    done: list[int] = []
    before = getattr(target, name)

    def acting(self: Loop, *args: Any, **kwargs: Any) -> Any:
        if self.step == step and not done:
            done.append(step)
            act()
        return before(self, *args, **kwargs)

    monkeypatch.setattr(target, name, acting)
    return done


# Disk ------------------------------------------------------------------------------------------


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The system itself refuses to write more than ``size`` bytes into one file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("size", [300, 20_000, 60_000])
def test_a_disk_that_is_full(
    size: int, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real failing writes: of config.json, of the weights (Rust), of the optimiser (C++)."""
    before = Loop.save

    def cramped(self: Loop, *args: Any, **kwargs: Any) -> None:
        if self.step == 6:
            with files_at_most(size):
                before(self, *args, **kwargs)
        before(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", cramped)
        with pytest.raises(MorError, match=r"checkpoint-6 could not be written") as caught:
            train(recipe)
    said = str(caught.value)
    assert "the disk is full or a quota is met" in said
    assert said.endswith("checkpoint-4 is kept: go on from it with --resume")
    assert kept(recipe) == [2, 4]
    assert not (recipe.run_dir / "checkpoints" / "saving").exists()  # its room is given back
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "some/file")


@pytest.mark.parametrize(
    ("where", "name"),
    [(checkpoints, "flush_tree"), (checkpoints, "digest"), (checkpoints, "flush")],
)
def test_a_disk_that_fills_while_a_save_is_sealed(
    where: Any, name: str, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        once_at(
            6,
            Loop,
            "save",
            lambda: patch.setattr(where, name, full),
            patch,
        )
        with pytest.raises(MorError, match=r"checkpoint-6 could not be written to .*disk is full"):
            train(recipe)
    assert kept(recipe) == [2, 4]
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


@pytest.mark.parametrize(
    ("name", "last"),
    [("mor.train.logs.log.append_jsonl", 4), ("mor.train.state.run_folder.write_whole", 8)],
)
def test_a_disk_that_fills_elsewhere(
    name: str, last: int, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log at step 5, the summary at the end."""
    with monkeypatch.context() as patch:
        once_at(4, Loop, "learn_micro_batch", lambda: patch.setattr(name, full), patch)
        with pytest.raises(
            MorError, match=rf"stopped after step \d: the disk is full.*checkpoint-{last} is kept"
        ):
            train(recipe)
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def test_another_error_of_a_file(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr(checkpoints, "publish", refused)
    with pytest.raises(MorError, match=r"checkpoint-2 .*some/file: Permission denied; no checkp"):
        train(recipe)


def test_a_mistake_of_ours_is_no_full_disk(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(checkpoints, "publish", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe)


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"
                     " memory: you tried to allocate 4 bytes. Error code 12"),
    ],
)  # fmt: skip
def test_out_of_memory(
    error: Exception, recipe: Recipe, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        once_at(5, Loop, "learn_micro_batch", fail, patch)
        with pytest.raises(MorError, match="out of memory after step 5") as caught:
            train(recipe)
    said = str(caught.value)
    assert "(micro-batches of 2 sequences of 16 tokens)" in said
    assert "set train.gradient_checkpointing=true or set train.batch_size=1 and" in said
    assert "train.gradient_accumulation_steps=4 (as many sequences per step)" in said
    assert said.endswith("checkpoint-4 is kept: go on from it with --resume")
    train(recipe, resume=True)
    assert weights(recipe.run_dir) == whole


def test_memory_that_is_really_not_there(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    once_at(1, Loop, "learn_micro_batch", lambda: torch.empty(2**60), monkeypatch)
    with pytest.raises(MorError, match=r"out of memory after step 1.*no checkpoint was saved yet"):
        train(recipe)


def test_what_would_be_lighter(data: Path, tmp_path: Path) -> None:
    last = tiny_recipe(data, tmp_path, batch_size=1, gradient_checkpointing=True)
    assert (
        guards.suggest_less_memory(last) == "shorten data.seq_len or shrink the model, in a new run"
    )
    odd = tiny_recipe(data, tmp_path, batch_size=11, gradient_checkpointing=True)
    assert (
        "train.batch_size=1 and train.gradient_accumulation_steps=22 "
        in guards.suggest_less_memory(odd)
    )


def test_any_other_error_stays_what_it_is(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise RuntimeError("shapes differ")

    once_at(3, Loop, "learn_micro_batch", wrong, monkeypatch)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe)


# Numbers that are none -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "micro_batch", "model"),
    [
        (float("nan"), 0, {}),
        (float("inf"), 1, {}),
        (float("nan"), 1, {"router_objective": "aux_router"}),
    ],
)
def test_a_loss_that_is_no_number_stops_that_step(
    value: float,
    micro_batch: int,
    model: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the step where it happens, before the optimiser moves anything, whatever is logged."""
    recipe = tiny_recipe(data, tmp_path, model=model, **fields(logging_steps=100))
    weights_before: list[torch.Tensor] = []
    models: list[torch.nn.Module] = []
    before = NextToken.__call__
    calls = 0

    def poisoned(self: NextToken, model: torch.nn.Module, *args: Any, **kwargs: Any) -> LossParts:
        nonlocal calls
        calls += 1
        parts = before(self, model, *args, **kwargs)
        if calls == 2 * 4 + 1:  # step 5 begins
            weights_before.extend(p.detach().clone() for p in model.parameters())
            models.append(model)
        if calls == 2 * 4 + 1 + micro_batch:
            parts.total = parts.total * value
        return parts

    monkeypatch.setattr(NextToken, "__call__", poisoned)
    with pytest.raises(MorError, match=r"is (nan|inf) at step 5; lower train\.learning_rate=0\.01"):
        train(recipe)
    assert kept(recipe) == [2, 4]
    now = models[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(weights_before, now, strict=True))
    assert not (recipe.run_dir / "model").exists()


def test_a_loss_may_be_infinite_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty that overflows has finite gradients; it is no loss to go on with."""
    before = NextToken.__call__
    calls = 0

    def poisoned(self: NextToken, *args: Any, **kwargs: Any) -> LossParts:
        nonlocal calls
        calls += 1
        parts = before(self, *args, **kwargs)
        if (calls - 1) // 2 == 2:  # two micro-batches a step
            parts.total = parts.total + float("inf")
        return parts

    monkeypatch.setattr(NextToken, "__call__", poisoned)
    with pytest.raises(MorError, match="the loss is inf at step 3"):
        train(recipe)


def test_an_auxiliary_routers_gradient_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is clipped by itself, so the network's norm does not show it."""
    recipe = tiny_recipe(data, tmp_path, model={"router_objective": "aux_router"}, **fields())
    before = Optimiser.clip
    calls = 0

    def poisoned(self: Optimiser) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            self.auxiliary[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
        return before(self)

    monkeypatch.setattr(Optimiser, "clip", poisoned)
    with pytest.raises(MorError, match="the auxiliary router's gradient norm is nan at step 3"):
        train(recipe)
    assert kept(recipe) == [2]


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_rate_that_breaks_all(logging_steps: int, data: Path, tmp_path: Path) -> None:
    """Step 1 learns nothing (warm-up from 0), step 2 breaks all; what was whole is kept."""
    recipe = tiny_recipe(
        data,
        tmp_path,
        learning_rate=1e25,
        budget={"steps": 20},
        save_steps=1,
        logging_steps=logging_steps,
        weight_decay=0.0,
    )
    with pytest.raises(MorError, match=r"at step [23]; lower train.learning_rate=1e\+25") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    saved = checkpoints.list_checkpoints(recipe.run_dir / "checkpoints")
    assert saved
    for checkpoint in saved:
        tensors = load_file(checkpoint / "model.safetensors")
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert not (recipe.run_dir / "model").exists()


def test_weights_that_are_no_numbers_are_not_saved(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever broke them between the gradient and the save."""
    before = Loop.save

    def poisoned(self: Loop, *args: Any, **kwargs: Any) -> None:
        if self.step == 4:
            with torch.no_grad():
                next(iter(self.parallel.plain.parameters()))[0] = float("nan")
        before(self, *args, **kwargs)

    monkeypatch.setattr(Loop, "save", poisoned)
    with pytest.raises(MorError, match="a weight is not a finite number at step 4"):
        train(recipe)
    assert kept(recipe) == [2]


def test_evaluation_draws_nothing_from_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The random router's draws, and so the weights, do not hang on how often one evaluates."""
    runs_ = [train(tiny_recipe(data, tmp_path / str(n), "random", eval_steps=n)) for n in (1, None)]
    assert weights(runs_[0]) == weights(runs_[1])
