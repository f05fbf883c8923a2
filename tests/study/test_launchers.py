"""Where the jobs of a study run: processes, a SLURM of our own making, Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mor.errors import Interrupted, MorError
from mor.study.launchers import Launcher, ProcessLauncher, Task, make_launcher, process, rays
from mor.study.launchers.base import taking_sigterm
from mor.study.launchers.slurm import SlurmLauncher

SAY = "import sys, os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), *sys.argv[1:]); "


def tasks(folder: Path, *codes: str) -> list[Task]:
    """Commands that say something and then run `codes`."""
    return [
        Task(f"job-{n}", (sys.executable, "-c", SAY + code, "a b", "$x'"), folder / f"{n}.log")
        for n, code in enumerate(codes)
    ]


def run(launcher: Launcher, work: Sequence[Task]) -> tuple[dict[str, str | None], list[str]]:
    """Reasons by name of what ended, and what was said."""
    ends: dict[str, str | None] = {}
    lines: list[str] = []
    launcher.run(
        work,
        lambda task: lines.append(task.name),
        lambda t, r: ends.update({t.name: r}),
        lines.append,
    )
    return ends, lines


def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "visible_gpus", lambda: ["4", "6"])
    work = tasks(tmp_path, "pass", "sys.exit('no luck')")
    work.append(Task("job-2", (sys.executable, "-c", "raise SystemExit(3)"), tmp_path / "2.log"))
    launcher = ProcessLauncher()
    assert launcher.workers == 2
    ends, _ = run(launcher, work)
    assert ends == {"job-0": None, "job-1": "no luck", "job-2": "exit status 3"}
    said = (tmp_path / "0.log").read_text().split()
    assert said == [said[0], "a", "b", "$x'"]
    assert {log.read_text().split()[0] for log in tmp_path.glob("[01].log")} <= {"4", "6"}


def test_sigterm_stops_the_jobs_too(tmp_path: Path) -> None:
    wait = (
        f"import signal, time; from pathlib import Path; os.chdir({str(tmp_path)!r});"
        "signal.signal(signal.SIGTERM, lambda *_: (Path('stopped').touch(), sys.exit(130)));"
        "Path('began').touch(); time.sleep(60)"
    )

    def stop() -> None:
        while not (tmp_path / "began").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    (stopper := threading.Thread(target=stop)).start()
    with pytest.raises(Interrupted, match="the same command goes on"), taking_sigterm():
        run(ProcessLauncher(1), tasks(tmp_path, wait))
    stopper.join()
    assert (tmp_path / "stopped").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_gpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert process.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8")
    assert process.visible_gpus() == ["3", "GPU-8"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert process.visible_gpus() == []
    assert ProcessLauncher().workers == (os.cpu_count() or 1)


def test_what_is_refused(tmp_path: Path) -> None:
    for name, options, message in [
        (
            "slrum",
            [],
            r"launcher='slrum' must be one of: process, slurm, ray; did you mean slurm\?",
        ),
        ("process", ["a=b"], r"launcher=process takes no options"),
        (
            "slurm",
            ["--partition=gpu"],
            r"launcher_option='--partition=gpu' must be an option of sba",
        ),
        ("slurm", ["partition="], r"must be an option of sbatch without dashes"),
        ("slurm", ["time=1\nrm -rf x"], r"must be an option of sbatch without dashes"),
        ("slurm", ["array=0-3"], r"the study sets array itself; leave it out"),
        ("ray", ["cpus=1"], r"launcher=ray takes address, num_cpus, num_gpus, as KEY=VALUE"),
        ("ray", ["num_gpus=one"], r"launcher_option='num_gpus=one' must be a number of 0 or more"),
        ("ray", ["num_cpus=-1"], r"must be a number of 0 or more"),
        ("ray", ["num_cpus=nan"], r"must be a number of 0 or more"),
    ]:
        with pytest.raises(MorError, match=message):
            make_launcher(name, tmp_path, None, options)


def test_ray_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MorError, match=r"launcher='ray' needs the package ray, .*\[ray\]"):
        make_launcher("ray", tmp_path)


# SLURM ------------------------------------------------------------------------------------------

SBATCH = """#!/bin/bash
# Runs every task of the array at once, again where it is requeued, and leaves the queue empty.
script=${@: -1}
[ -n "$FAKE_REFUSES" ] && { echo "sbatch: error: $FAKE_REFUSES" >&2; exit 1; }
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for n in $(seq 0 "$last"); do
    for try in 1 2 3; do
        rm -f "$FAKE/requeued"
        SLURM_ARRAY_TASK_ID=$n SLURM_JOB_ID=7$n bash "$script" >>"$FAKE/array.log" 2>&1
        [ -e "$FAKE/requeued" ] || break
    done
done
echo "7;cluster"
"""
SQUEUE = """#!/bin/bash
echo "$@" >>"$FAKE/squeue.log"
n=$(wc -l <"$FAKE/squeue.log")
[ -n "$FAKE_AWAY" ] && { echo "squeue: error: Unable to contact slurm controller" >&2; exit 1; }
[ "$n" -lt 3 ] && { echo "7_[0] gpu mor-study R"; exit; }
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM of one machine on PATH; what it notes is in the folder."""
    folder = tmp_path / "slurm bin"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH,
        "squeue": SQUEUE,
        "srun": '#!/bin/bash\nexec "$@"\n',
        "scontrol": '#!/bin/bash\necho "$@" >>"$FAKE/scontrol.log"; touch "$FAKE/requeued"\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def slurm_launcher(out: Path, **options: object) -> SlurmLauncher:
    return SlurmLauncher(out, seconds=0.0, **options)  # type: ignore[arg-type]


def test_an_array_is_submitted_and_watched(slurm: Path, tmp_path: Path) -> None:
    once = f"import pathlib; f = pathlib.Path({str(tmp_path / 'seen')!r})\n"
    stopped = once + "if not f.exists(): f.touch(); sys.exit(130)"
    work = tasks(tmp_path, "pass", "sys.exit('no luck')", stopped)
    launcher = slurm_launcher(tmp_path / "a study", workers=2, options=["gres=gpu:1", "exclusive"])
    ends, lines = run(launcher, work)
    assert ends == {"job-0": None, "job-1": "no luck", "job-2": None}
    assert lines == ["job-0", "job-1", "job-2", lines[-1]]
    assert lines[-1].startswith("SLURM job 7: waiting")
    assert (tmp_path / "0.log").read_text().endswith("a b $x'\n")
    # Stopped before its time limit, it was queued again.
    assert (slurm / "scontrol.log").read_text() == "requeue 72\n"
    text = (tmp_path / "a study/slurm/array.sh").read_text()
    for line in ("--array=0-2%2", "--gres=gpu:1", "--exclusive", "--signal=USR1@120", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert not (tmp_path / "a study/slurm/job.json").exists()
    assert len((slurm / "squeue.log").read_text().splitlines()) == 3


def test_jobs_of_before_are_waited_for(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tasks(tmp_path, "pass", "pass")
    launcher = slurm_launcher(tmp_path)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mor.study.launchers.slurm.time.sleep", interrupt)
    with pytest.raises(Interrupted, match=r"SLURM job 7 goes on \(scancel 7 ends it\)"):
        run(launcher, work)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(slurm))
    (tmp_path / "slurm/job-1.status").write_text("1\n")  # this one had failed
    ends, _ = run(slurm_launcher(tmp_path), work)
    assert ends == {"job-1": None}  # tried again; the other was done
    assert "0) log=" in (tmp_path / "slurm/array.sh").read_text()
    assert "1) log=" not in (tmp_path / "slurm/array.sh").read_text()


def test_slurm_that_refuses_or_is_not_there(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tasks(tmp_path, "pass")
    monkeypatch.setenv("FAKE_REFUSES", "invalid partition specified: gpu")
    with pytest.raises(MorError, match=r"sbatch refused .*: sbatch: error: invalid partition"):
        run(slurm_launcher(tmp_path), work)
    monkeypatch.delenv("FAKE_REFUSES")
    monkeypatch.setenv("FAKE_AWAY", "1")
    with pytest.raises(
        MorError, match=r"squeue does not answer for SLURM job 7: .*controller; the"
    ):
        run(slurm_launcher(tmp_path), work)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MorError, match=r"squeue is not on PATH, and SLURM job 7 may still run"):
        run(slurm_launcher(tmp_path), work)
    (tmp_path / "slurm/job.json").unlink()
    with pytest.raises(MorError, match=r"sbatch is not on PATH; .*array\.sh is written: submit it"):
        run(slurm_launcher(tmp_path), work)
    checked = subprocess.run(["/bin/bash", "-n", tmp_path / "slurm/array.sh"], check=False)
    assert checked.returncode == 0


# Ray --------------------------------------------------------------------------------------------


class FakeRay(types.ModuleType):
    """What the launcher asks of Ray, in this process. (The real one takes a minute to start.)"""

    class exceptions:
        class RayError(Exception):
            """A task or its node died."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[tuple[str, object]] = []
        self.most, self.live = 0, 0

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str | None, log_to_driver: bool) -> None:
        if address == "gone:1":
            raise ConnectionError("Could not find any running Ray instance")
        self.calls.append(("init", address))

    def shutdown(self) -> None:
        self.calls.append(("shutdown", None))

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0, "GPU": 2.0}

    def remote(self, **needs: object) -> Any:
        self.calls.append(("remote", needs))

        class Made:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                self.live += 1
                self.most = max(self.most, self.live)
                return lambda: rays.run_command(*arguments)

        return lambda function: Made

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.live -= 1
        return running[:1], running[1:]

    def get(self, done: Any) -> str | None:
        reason: str | None = done()
        if reason == "node":
            raise self.exceptions.RayError("the node died")
        return reason


def test_tasks_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    work = tasks(tmp_path, "pass", "sys.exit('no luck')", "sys.exit('node')")
    ends, lines = run(make_launcher("ray", tmp_path, 2, ["num_cpus=2"]), work)
    assert ends == {"job-0": None, "job-1": "no luck", "job-2": "the node died"}
    assert lines == ["job-0", "job-1", "job-2"]
    needs = {"max_retries": 3, "num_cpus": 2.0, "num_gpus": 1.0}
    assert ray.calls == [("init", None), ("remote", needs), ("shutdown", None)]
    assert ray.most == 2
    with pytest.raises(MorError, match=r"'num_gpus=3': the cluster has 2 GPUs, so no job would"):
        run(make_launcher("ray", tmp_path, None, ["num_gpus=3"]), work)
    with pytest.raises(MorError, match=r"'address=gone:1': no Ray there: Could not find any"):
        run(make_launcher("ray", tmp_path, None, ["address=gone:1"]), work)
