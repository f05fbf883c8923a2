"""Where a run tells what it does: ``log.jsonl``, a progress bar, and reporters such as W&B."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mor.disk import append_jsonl, flush, write_whole
from mor.train.logs.reporters import Reporter

Entry = dict[str, Any]


class RunLog:
    """Takes the entries of a run and passes each on to everything that shows it.

    Only the first rank writes; the others keep the same entries in memory.

    Args:
        path: of ``log.jsonl``.
        label: name of the run, for the bar.
        steps: optimiser steps of the whole run.
        first: whether this is the rank that writes.
        reporters: get every entry beside the file.
        console: of the bar; default standard error.

    Attributes:
        entries: those of the run so far, sessions before a resume included.
    """

    def __init__(
        self,
        path: Path,
        label: str,
        steps: int,
        *,
        first: bool = True,
        reporters: Sequence[Reporter] = (),
        console: Console | None = None,
    ) -> None:
        self.path, self.first = path, first
        self.bar = ProgressBar(label, steps, console, silent=not first)
        self.reporters = list(reporters) if first else []
        self.entries: list[Entry] = []
        self._step = 0

    def read(self, step: int) -> None:
        """Take over the entries up to ``step``; what lies past it is dropped from the file."""
        self._step = step
        if not self.path.exists():
            return
        self.entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                if 0 < entry["step"] <= step:
                    self.entries.append(entry)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        if self.first:
            lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in self.entries]
            write_whole(self.path, "".join(lines))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Show the bar and start the reporters; end them whatever happens."""
        try:
            for reporter in self.reporters:
                reporter.start()
            self.bar.start(self._step)
            yield
        finally:
            self.bar.close()
            for reporter in self.reporters:
                reporter.finish()

    def write(self, entry: Entry, step: int) -> None:
        """Log an entry about the state after ``step`` optimiser steps."""
        entry = {"step": step} | entry
        if "eval_loss" in entry:
            entry["eval_nll"] = entry["eval_loss"]
        self.entries.append(entry)
        if not self.first:
            return
        append_jsonl(self.path, entry)
        self.bar.show(entry)
        for reporter in self.reporters:
            reporter.log({name: value for name, value in entry.items() if name != "step"}, step)

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        self.bar.advance(step)

    def last(self, name: str) -> Any:
        """The newest value of ``name``; None if no entry has one."""
        return next((entry[name] for entry in reversed(self.entries) if name in entry), None)

    def flush(self) -> None:
        """Have the system write the file: a power cut must not take lines before a checkpoint."""
        if self.first and self.path.exists():
            flush(self.path)


class ProgressBar:
    """One bar with loss, tokens/s and time left on a terminal; elsewhere a line every tenth.

    Args:
        label: name of the run.
        steps: optimiser steps of the whole run.
        console: default standard error.
        silent: show nothing.
    """

    def __init__(
        self, label: str, steps: int, console: Console | None = None, *, silent: bool = False
    ) -> None:
        self.label, self.steps, self.silent = label, steps, silent
        self.console = console or Console(file=sys.stderr, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._began, self._first, self._shown = 0.0, 0, 0

    def start(self, step: int) -> None:
        """Begin at ``step`` optimiser steps done."""
        self._began, self._first = time.monotonic(), step
        if self.silent or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(self.label, total=self.steps, completed=step, note="")
        self._bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, entry: Entry) -> None:
        """Show loss and speed of a log entry; one without them (an evaluation) changes nothing."""
        if self.silent or "lm_loss" not in entry:
            return
        step, last = int(entry["step"]), self.steps
        note = f"loss {entry['lm_loss']:z.3f} · {entry['tokens_per_s']:z,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, note=note)
        elif step * 10 // last > self._shown * 10 // last:
            self._shown = step
            spent = (time.monotonic() - self._began) / max(1, step - self._first)
            left = spent * (last - step)
            self.console.print(f"{self.label}: step {step}/{last} · {note} · {left:z.0f} s left")

    def close(self) -> None:
        """Stop the bar if it runs; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
