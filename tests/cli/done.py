"""Commands as a user runs them: how they end, and what they write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Done:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that said why it failed, after bars of the work until then."""
        assert self.code == 2, self
        *before, last = self.err.strip().splitlines()
        assert all("━" in line for line in before), self.err
        assert last.startswith("error: ")
        return last.removeprefix("error: ")


Mor = Callable[..., Done]


def rows_of(table: str) -> dict[str, str]:
    """The cells of a table of two columns."""
    return {
        cells[1].strip(): cells[2].strip()
        for line in table.splitlines()
        if len(cells := line.split("│")) == 4
    }
