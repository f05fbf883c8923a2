"""Two and four processes train as one does: DDP, FSDP2, checkpoints that go from one to another.

``ranks_worker`` makes all the runs, once; each test reads what it left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mor.cli import main
from mor.errors import MorError
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.train.state import checkpoints, sharded
from tests.processes import run_group
from tests.train.ranks_worker import MODES, PHASES, SAVED, SETTINGS, STEPS, Job, run_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks"),
]
JOBS = [job for phase in PHASES for job in phase]
TIMEOUT = 900  # seconds; on a busy machine four gloo processes wait for each other
SEVERAL = [job for job in JOBS if job.world > 1 or job.after]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every run in it; where pytest has several workers, one makes it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    done, failed = folder / "done", folder / "failed"
    try:
        folder.mkdir()
    except FileExistsError:
        give_up = time.monotonic() + 2 * TIMEOUT
        while not done.exists():
            if failed.exists() or time.monotonic() > give_up:
                pytest.fail("another worker could not make the runs")
            time.sleep(0.2)
        return folder
    try:
        run_group(["-m", "tests.train.ranks_worker", str(folder)], timeout=TIMEOUT)
    except BaseException:
        failed.touch()
        raise
    done.touch()
    return folder


def log_of(runs: Path, job: Job) -> list[dict[str, Any]]:
    lines = (run_folder(runs, job) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def logged(runs: Path, job: Job, name: str) -> list[float]:
    return [entry[name] for entry in log_of(runs, job) if name in entry]


def seen(runs: Path, job: Job) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [json.loads((runs / f"{job.name}.{n}.json").read_text()) for n in range(job.world)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_every_setting_meets_every_number_of_ranks() -> None:
    """Otherwise a test below could pass for want of runs."""
    for setting in SETTINGS:
        assert {job.world for job in JOBS if job.setting == setting} >= {1, 2}
    assert {(job.world, job.mode) for job in SEVERAL} >= {(n, m) for n in (2, 4) for m in MODES}


@pytest.mark.parametrize("job", SEVERAL, ids=lambda job: job.name)
def test_as_one_process(job: Job, runs: Path) -> None:
    """Losses, parts of the loss, gradient norms, scores, weights and stored boundaries."""
    alone = Job(job.setting, 1)
    names = {name for entry in log_of(runs, alone) for name in entry}
    losses = {"loss", "lm_loss", "grad_norm", "eval_loss"} & names
    losses |= {name for name in names if name.startswith("router/") and name.endswith("_loss")}
    # bfloat16 has 8 bits; what is summed in which order shows.
    narrow = job.setting == "narrow"
    near = {"rel": 1e-3, "abs": 1e-3} if narrow else {"rel": 2e-5, "abs": 1e-6}
    for name in losses | {"tokens", "flops", "step"}:
        expected = logged(runs, alone, name)
        assert len(expected) >= (1 if name == "eval_loss" else STEPS)
        assert logged(runs, job, name) == pytest.approx(expected, **near), name
    found, expected = weights(run_folder(runs, job)), weights(run_folder(runs, alone))
    assert found.keys() == expected.keys()
    assert_close(found, expected, rtol=1e-4, atol=3e-3 if narrow else 2e-6)


def test_something_was_learnt(runs: Path) -> None:
    """Equal runs that stand still would prove nothing."""
    for setting in SETTINGS:
        losses = logged(runs, Job(setting, 1), "loss")
        assert losses[-1] < losses[0] - 0.1
        assert len({round(loss, 4) for loss in losses}) == STEPS


@pytest.mark.parametrize("job", SEVERAL, ids=lambda job: job.name)
def test_ranks_end_alike(job: Job, runs: Path) -> None:
    """Boundaries and biases are the same bits on every rank; weights stay tied and sharded."""
    first, *others = found = seen(runs, job)
    assert all(other["buffers"] == first["buffers"] for other in others)
    if job.setting in ("threshold", "long", "unused"):
        moved = first["buffers"]["bias" if job.setting == "unused" else "boundary"]
        assert any(moved)
    tied = SETTINGS[job.setting][1].get("tie_word_embeddings", True)
    assert all(one["tied"] == tied for one in found)
    if job.mode == "ddp":
        assert not any(any(one["sharded"]) for one in found)
        assert all(one["held"] == first["parameters"] for one in found)
    else:
        assert all(all(one["sharded"]) for one in found)
        assert sum(one["held"] for one in found) == first["parameters"]
        assert first["held"] < 1.2 * first["parameters"] / job.world + 100


@pytest.mark.parametrize("job", [j for j in SEVERAL if not j.after], ids=lambda job: job.name)
def test_gathered_once_per_step(job: Job, runs: Path) -> None:
    """The paper's point: R recursions for one gather, over all micro-batches of a step."""
    micro = 2 if job.setting == "accumulate" else 1
    # Root, one private layer before and after, a block of one layer that runs R = 3 times.
    gathers = {"ddp": 0, "fsdp": 1 + 2 + 1, "regather": micro * (1 + 2 * 2 + 2 * 3)}[job.mode]
    if (job.setting, job.mode) == ("propagate", "regather"):
        gathers += 2 * 2  # before depths 1 and 2 the block says how tokens ended
    # Gathered once: all micro-batches reduce together, but for the block, whose earlier gradients
    # go on their way before its last.
    reduces = {"ddp": 0, "fsdp": 1 + 2 + micro, "regather": micro * (1 + 2 + 1)}[job.mode]
    for one in seen(runs, job):
        assert one["all_gather"] == STEPS * gathers
        assert one["reduce_scatter"] == STEPS * reduces


def test_some_ranks_had_no_token(runs: Path) -> None:
    """The runs of ``sparse`` are those in which a rank would have left the others waiting."""
    sparse = [job for job in SEVERAL if job.setting == "sparse"]
    assert len(sparse) >= 3
    for job in sparse:
        if job.world == 4:
            assert any(one["nobody"] for one in seen(runs, job))


# Checkpoints ------------------------------------------------------------------------------------


def checkpoint(runs: Path, job: Job, step: int = SAVED) -> Path:
    return run_folder(runs, job) / "checkpoints" / f"checkpoint-{step}"


@pytest.mark.parametrize("world", [2, 4])
def test_checkpoints_are_sharded(world: int, runs: Path) -> None:
    """Each rank wrote a part, none the whole; nothing but shards holds weights."""
    folder = checkpoint(runs, Job("long", world, "fsdp"))
    for part in (sharded.WEIGHTS, sharded.OPTIMIZER):
        sizes = [path.stat().st_size for path in (folder / part).glob("*.distcp")]
        assert len(sizes) == world
        assert max(sizes) < 0.75 * sum(sizes)
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "optimizer.pt").exists()


@pytest.mark.parametrize("world", [2, 4])
def test_merged_is_what_one_process_has(
    world: int, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mor merge`` leaves a model folder, tokenizer included."""
    folder, out = checkpoint(runs, Job("long", world, "fsdp")), tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["mor", "merge", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    merged = load_model(out)
    expected = load_file(checkpoint(runs, Job("long", 1)) / "model.safetensors")
    state = merged.state_dict()
    assert_close({name: state[name] for name in expected}, expected, rtol=1e-4, atol=2e-6)
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.architectures == ["MoRForCausalLM"]
    text = "thou said to my king"
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert merged.generate(torch.tensor([[5, 7]]), max_new_tokens=3, do_sample=False).shape == (
        1,
        5,
    )


def test_merge_takes_a_run_and_an_ordinary_checkpoint(runs: Path, tmp_path: Path) -> None:
    sharded.merge(checkpoint(runs, Job("long", 1)), tmp_path / "plain")
    expected = load_file(checkpoint(runs, Job("long", 1)) / "model.safetensors")
    assert_close(load_file(tmp_path / "plain" / "model.safetensors"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("part", [sharded.WEIGHTS, sharded.OPTIMIZER])
@pytest.mark.parametrize("harm", ["cut", "gone", "metadata"])
def test_a_damaged_shard_is_refused(part: str, harm: str, runs: Path, tmp_path: Path) -> None:
    source = run_folder(runs, Job("long", 2, "fsdp")) / "checkpoints"
    shutil.copytree(source, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / f"checkpoint-{STEPS}"
    assert checkpoints.newest(folder.parent) == folder
    victim = max((folder / part).glob("*.distcp"), key=lambda path: path.stat().st_size)
    if harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-60])
    elif harm == "gone":
        victim.unlink()
    else:
        (folder / part / ".metadata").write_bytes(b"no metadata")
    with pytest.raises(MorError, match=rf"is damaged.*--resume-from checkpoint-{SAVED}"):
        checkpoints.newest(folder.parent)
    (folder / checkpoints.MANIFEST).unlink()  # then the form alone can tell
    with pytest.raises(MorError, match="a shard is missing or cut short"):
        checkpoints.newest(folder.parent)
    if part == sharded.WEIGHTS:
        with pytest.raises(MorError, match="is missing a file or damaged"):
            sharded.merge(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
