"""Prompts that are far too long are refused for the price of what fits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.config import MoRConfig
from mor.data.tokenizer import train_tokenizer
from mor.engine.fitting import PIECE, is_too_long
from mor.engine.intake import TooLong, prompt_ids
from tests.strategies import small_config

TEXTS = ["the king said to the queen: naïve – 東京 🙂🙂", "thou art the crown of my lord"]


class Counting:
    """A tokenizer that counts characters."""

    def __init__(self) -> None:
        self.inner, self.characters = _trained(), 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@cache
def _trained() -> Any:
    return train_tokenizer(TEXTS * 20, 400)


def config() -> MoRConfig:
    return small_config("threshold", vocab_size=400, bos_token_id=0, eos_token_id=0)


HUGE = 1_000_000


@pytest.mark.parametrize("text", ["x" * HUGE, "the king " * (HUGE // 9), " " * HUGE, "東京" * HUGE])
def test_no_more_is_encoded_than_what_fits(text: str) -> None:
    tokenizer = Counting()
    with pytest.raises(TooLong, match="more than the 2000 tokens that fit"):
        prompt_ids(text, tokenizer, config(), 2000)
    assert tokenizer.characters <= 2 * PIECE + 100


def test_what_fits_is_not_refused() -> None:
    text = TEXTS[0] * 800
    ids = _trained()(text).input_ids
    tokenizer = Counting()
    assert prompt_ids(text, tokenizer, config(), len(ids)) == tuple(ids)
    assert tokenizer.characters <= 2 * len(text) + 100
    with pytest.raises(TooLong):
        prompt_ids(text, tokenizer, config(), len(ids) - 1)


@given(st.text("thek in\n東🙂", max_size=40), st.integers(1, 600), st.integers(-3, 3))
@settings(max_examples=20)
def test_it_is_right(part: str, times: int, more: int) -> None:
    text = part * times
    ids = _trained()(text).input_ids
    if is_too_long(text, _trained(), len(ids) + more):
        assert more < 0


def test_token_ids_are_counted_before_they_are_looked_at() -> None:
    with pytest.raises(TooLong, match="prompt of 50 tokens is past max_model_len=20"):
        prompt_ids([-1] * 50, None, config(), 20)
