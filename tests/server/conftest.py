from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import TOOL_TEMPLATE, Live, make_engine, serving


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server that tests share; they leave nothing under way."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def caller() -> Iterator[Live]:
    """A server whose chat template knows functions."""
    with serving(make_engine(512), chat_template=TOOL_TEMPLATE) as running:
        yield running
