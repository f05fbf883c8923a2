"""A request chooses its capacity, where levels are calibrated."""

from __future__ import annotations

import openai
import pytest

from mor.engine import SamplingParams
from mor.errors import MorError
from mor.folder.levels import Level, Levels
from mor.server import create_app
from tests.server.live import NAME, Live, make_engine, model, serving

STORED = tuple(model().model.router.boundary.tolist())  # type: ignore[operator, union-attr]
LEVELS = Levels(
    (
        Level(0.5, (1.0, 0.3, 0.2), tuple(b + 9.0 for b in STORED)),
        Level(1.5, (1.0, 0.9, 0.5), tuple(b - 9.0 for b in STORED)),
    )
)


def test_capacity_moves_the_depths() -> None:
    with serving(levels=LEVELS) as live:
        client = live.openai()
        (card,) = client.models.list().data
        assert card.capacity == {"lowest": 0.5, "highest": 1.5}  # type: ignore[attr-defined]
        means = {}
        for capacity in (0.5, 1.0, 1.5):
            choice = client.completions.create(
                model=NAME, prompt="the king said", max_tokens=40, temperature=0,
                extra_body={"capacity": capacity, "ignore_eos": True},
            ).choices[0]  # fmt: skip
            means[capacity] = sum(choice.depths) / 40  # type: ignore[attr-defined]
            params = SamplingParams(
                max_tokens=40, temperature=0.0, ignore_eos=True,
                boundaries=LEVELS.boundaries(capacity),
            )  # fmt: skip
            (wanted,) = make_engine().generate("the king said", params)
            assert choice.text == wanted.completions[0].text
        assert means[0.5] < means[1.0] < means[1.5]
        for wrong in (0.4, 1.6):
            with pytest.raises(openai.BadRequestError, match=r"0\.5\.\.1\.5") as found:
                client.completions.create(model=NAME, prompt="the", extra_body={"capacity": wrong})
            assert found.value.param == "capacity"


def test_without_levels(live: Live) -> None:
    client = live.openai()
    (card,) = client.models.list().data
    assert card.capacity is None  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError, match="mor calibrate"):
        client.completions.create(model=NAME, prompt="the", extra_body={"capacity": 1.0})


def test_levels_of_another_model() -> None:
    two = Levels((Level(0.5, (1.0, 0.3), (0.0, 1.0)), Level(1.0, (1.0, 0.6), (0.0, 0.0))))
    with pytest.raises(MorError, match="another model"):
        create_app(make_engine(), NAME, levels=two)
