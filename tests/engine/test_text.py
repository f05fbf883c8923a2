"""Text grows and is never taken back; stop texts are found wherever they begin."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mor.data.tokenizer import train_tokenizer
from mor.engine import Engine
from mor.engine.text import GrowingText, choose_decode
from mor.errors import MorError
from tests.engine.oracle import greedy, idle, run
from tests.strategies import make_model, small_config

TEXTS = ["the king said to the queen: naïve – 東京 🙂🙂", "thou art the crown of my lord"]


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@given(st.lists(st.integers(0, 299), max_size=40))
def test_the_text_grows_into_the_whole_decoded(ids: list[int]) -> None:
    ids = [i % len(tokenizer()) for i in ids]
    stream = GrowingText(tokenizer(), ())
    before = ""
    for token in ids:
        assert not stream.push(token)
        text = stream.text(False)
        assert text.startswith(before)
        before = text
    whole = tokenizer().decode(ids, skip_special_tokens=True)
    assert stream.text(True) == whole
    assert whole.startswith(before)


@given(st.lists(st.integers(0, 299), max_size=20), st.booleans())
def test_the_short_way_decodes_the_same(ids: list[int], skip: bool) -> None:
    ids = [i % len(tokenizer()) for i in ids]
    short = choose_decode(tokenizer())
    assert short(ids, skip_special_tokens=skip) == tokenizer().decode(ids, skip_special_tokens=skip)


def test_the_short_way_is_for_plain_tokenizers_alone() -> None:
    """A class of its own, or spaces to clean up, go through the tokenizer itself."""

    class Loud(PreTrainedTokenizerFast):
        def decode(self, *args: Any, **how: Any) -> str:
            return str(super().decode(*args, **how)).upper()

    backend = tokenizer().backend_tokenizer
    assert choose_decode(tokenizer()) == backend.decode
    ids = tokenizer()("the king").input_ids
    assert choose_decode(Loud(tokenizer_object=backend))(ids) == "THE KING"
    cleaning = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True)
    assert choose_decode(cleaning) != backend.decode


@given(st.sampled_from(TEXTS), st.data())
def test_a_stop_text_ends_the_text_before_it(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stops = [text[start : data.draw(st.integers(start + 1, min(len(text), start + 6)))], "zzz"]
    stream = GrowingText(tokenizer(), tuple(stops))
    wanted = text[: text.find(stops[0])]
    shown = ""
    for token in tokenizer()(text).input_ids:
        stopped = stream.push(token)
        now = stream.text(stopped)
        assert now.startswith(shown)
        assert wanted.startswith(now)
        shown = now
        if stopped:
            break
    else:
        raise AssertionError("the stop text was not found")
    assert shown == wanted
    assert stream.stopped_by == stops[0]


def test_the_first_of_several_stop_texts_wins() -> None:
    stream = GrowingText(tokenizer(), ("crown", "art", "of"))
    for token in tokenizer()(TEXTS[1]).input_ids:
        if stream.push(token):
            break
    assert (stream.text(True), stream.stopped_by) == ("thou ", "art")


def test_bytes_that_are_no_text_cost_no_more_and_more() -> None:
    letters = tokenizer().convert_tokens_to_ids(["\u00ff", "\u00c2", "\u0142", "k"])
    assert None not in letters

    class Counting:
        longest = 0

        def decode(self, ids: list[int], **options: Any) -> Any:
            self.longest = max(self.longest, len(ids))
            return tokenizer().decode(ids, **options)

    for pattern in ([0], [0, 1], [0, 2, 2], [0, 0, 0, 3]):
        ids = [letters[i] for i in pattern] * 60
        counting = Counting()
        text, before = GrowingText(counting, ()), ""
        for token in ids:
            text.push(token)
            assert text.text(False).startswith(before)
            before = text.text(False)
        assert text.text(True) == tokenizer().decode(ids)
        assert counting.longest < 50


def test_what_may_become_a_stop_text_is_held_back() -> None:
    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(chr(i) for i in ids)

    stream = GrowingText(Letters(), ("abc",))
    shown = []
    for letter in "xabyabaab":
        stream.push(ord(letter))
        shown.append(stream.text(False))
    assert shown == ["x", "x", "x", "xaby", "xaby", "xaby", "xabyab", "xabyaba", "xabyaba"]
    assert stream.text(True) == "xabyabaab"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    size = len(tokenizer())
    config = small_config("threshold", vocab_size=size, bos_token_id=0, eos_token_id=0)
    make_model(config, 3).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_a_folder_brings_its_tokenizer(folder: Path) -> None:
    engine = Engine(folder, max_model_len=64)
    outputs = engine.generate(["the king", "", "東京"], greedy(10, ignore_eos=True))
    for prompt, output in zip(["the king", "", "東京"], outputs, strict=True):
        ids = tokenizer()(prompt).input_ids if prompt else [0]
        assert list(output.prompt_token_ids) == ids
        done = output.completions[0]
        assert len(done.token_ids) == 10
        assert done.text == tokenizer().decode(done.token_ids, skip_special_tokens=True)
    (single,) = engine.generate("the king", greedy(10, ignore_eos=True))
    assert single.completions[0].token_ids == outputs[0].completions[0].token_ids
    idle(engine)


def test_a_stop_text_in_the_engine(folder: Path) -> None:
    engine = Engine(folder, max_model_len=64)
    (free,) = engine.generate("thou art", greedy(20, ignore_eos=True))
    text = free.completions[0].text
    assert text is not None
    stop = next(text[i : i + 2] for i in range(4, len(text) - 2) if text[i : i + 2].isascii())
    engine.add_request("thou art", greedy(20, ignore_eos=True, stop=stop), "stopped")
    seen = [""]
    while engine.unfinished:
        for output in engine.step():
            now = output.completions[0].text
            assert now is not None
            assert now.startswith(seen[-1])
            seen.append(now)
    done = output.completions[0]
    assert done.text == text[: text.find(stop)]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert done.token_ids == free.completions[0].token_ids[: len(done.token_ids)]
    idle(engine)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist"):
        Engine(tmp_path / "nowhere")


def test_without_a_tokenizer_there_is_no_text() -> None:
    engine = Engine(make_model(small_config("threshold")), max_model_len=20)
    engine.add_request([1], greedy(2), "ids")
    assert run(engine)["ids"].completions[0].text is None
