from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import Live, serving


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server that tests share; they leave nothing under way."""
    with serving() as running:
        yield running
