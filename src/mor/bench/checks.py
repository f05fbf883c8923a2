"""Checks before a benchmark: all of them run, and nothing is timed when one fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import ParamSpec, get_args

from mor.config.choices import KVSharing

P = ParamSpec("P")

# What a check of all models goes through.
ROUTERS = ("fixed", "expert_choice", "threshold", "token_choice")
KV_MODES = get_args(KVSharing)


class Checks:
    """Runs checks one after another and remembers which failed.

    A machine that is at hand for minutes should show all of its faults in one run, so a failure
    stops nothing before :meth:`finish`.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []

    def run(self, name: str, check: Callable[P, object], *args: P.args, **words: P.kwargs) -> None:
        """Call ``check``, which raises when something is wrong, and print what came of it."""
        try:
            check(*args, **words)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename}:{where.lineno}"
            print(f"wrong {name}: {type(error).__name__}: {error} ({place})", flush=True)
            self.failed.append(name)
        else:
            print(f"ok {name}", flush=True)

    def finish(self) -> None:
        """End the program if a check failed.

        Raises:
            SystemExit: it names the checks that failed.
        """
        if self.failed:
            names = "\n  ".join(self.failed)
            raise SystemExit(f"{len(self.failed)} checks failed, so nothing is timed:\n  {names}")
