"""Log-probabilities of prompts and answers, in OpenAI's old form and in vLLM's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mor.engine import TokenLogprobs
from mor.server.likelihoods import prompt_offsets, top_by_name
from mor.server.tokens import Tokens
from tests.server.live import NAME, Live, model, tokenizer
from tests.server.test_openai import CHAT, GREEDY, MESSAGES

SPECIAL = "<|endoftext|>the king<|endoftext|> said"


def own_logs(ids: list[int]) -> torch.Tensor:
    """[T - 1, V] of the model's own forward."""
    with torch.no_grad():
        return model()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def ids_of(text: str) -> list[int]:
    return list(tokenizer()(text).input_ids)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("prompt", [SPECIAL, "the king said: naïve – 東京", "x", "🙂"])
def test_echo_gives_back_the_prompt_and_its_log_probabilities(
    live: Live, prompt: str, as_ids: bool
) -> None:
    ids = ids_of(prompt)
    answer = live.openai().completions.create(
        prompt=ids if as_ids else prompt, max_tokens=0, echo=True, logprobs=2, **GREEDY
    )
    choice, usage = answer.choices[0], answer.usage
    assert (choice.text, choice.finish_reason) == (prompt, "length")
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 0)
    told: Any = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids)
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    logs = own_logs(ids)
    wanted = [row[token].item() for row, token in zip(logs, ids[1:], strict=True)]
    assert told.token_logprobs[1:] == pytest.approx(wanted, abs=1e-9)
    for name, value, top, row in zip(
        told.tokens[1:], wanted, told.top_logprobs[1:], logs, strict=True
    ):
        assert top[name] == pytest.approx(value)
        assert 2 <= len(top) <= 3
        assert max(top.values()) == pytest.approx(row.max().item())
    for place, name in zip(told.text_offset, told.tokens, strict=True):
        if not name.startswith("bytes:"):
            assert prompt.startswith(name, place)


def test_prompt_and_answer_together(live: Live) -> None:
    client = live.openai()
    fields: Any = {"prompt": [SPECIAL, "the"], "n": 2, "max_tokens": 5, "logprobs": 1, **GREEDY}
    plain = client.completions.create(**fields)
    echo = client.completions.create(echo=True, **fields)
    for one, other, prompt in zip(
        plain.choices, echo.choices, [SPECIAL, SPECIAL, "the", "the"], strict=True
    ):
        own: Any = one.logprobs
        both: Any = other.logprobs
        assert other.text == prompt + one.text
        count = len(ids_of(prompt))
        assert both.tokens[count:] == own.tokens
        assert both.token_logprobs[count:] == pytest.approx(own.token_logprobs)
        shifted = [len(prompt) + place for place in own.text_offset]
        assert both.text_offset[count:] == shifted
    parts: list[list[Any]] = [[] for _ in range(4)]
    for chunk in client.completions.create(echo=True, stream=True, **fields):
        parts[chunk.choices[0].index].append(chunk.choices[0])
    for chunks, other in zip(parts, echo.choices, strict=True):
        assert "".join(chunk.text for chunk in chunks) == other.text
        whole: Any = other.logprobs
        for field in ("tokens", "token_logprobs", "text_offset"):
            found = [value for chunk in chunks for value in getattr(chunk.logprobs, field)]
            assert (
                found == pytest.approx(getattr(whole, field))
                if field[:6] == "token_"
                else (found == getattr(whole, field))
            )


def test_echo_alone_needs_no_new_token(live: Live) -> None:
    answer = live.openai().completions.create(prompt=SPECIAL, max_tokens=0, echo=True, model=NAME)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == (SPECIAL, None)
    stream = live.openai().completions.create(
        prompt=SPECIAL, max_tokens=0, echo=True, model=NAME, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == SPECIAL


@pytest.mark.parametrize("prompt", ["", ["", "the king"], ["the king", ""]])
def test_a_stream_echoes_what_a_whole_answer_does(live: Live, prompt: Any) -> None:
    fields: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 1}
    fields |= {"model": NAME, "seed": 1}
    whole = live.openai().completions.create(**fields).choices
    told: dict[int, list[Any]] = {choice.index: [] for choice in whole}
    for chunk in live.openai().completions.create(**fields, stream=True):
        told[chunk.choices[0].index].append(chunk.choices[0])
    for choice in whole:
        parts = told[choice.index]
        assert "".join(part.text for part in parts) == choice.text
        tokens = [token for part in parts for token in part.logprobs.tokens]
        assert tokens == choice.logprobs.tokens
        assert choice.logprobs.token_logprobs[0] is None


def test_prompt_logprobs_as_in_vllm(live: Live) -> None:
    ids, logs = ids_of("the king"), own_logs(ids_of("the king"))
    with live.http() as http:
        body = {"model": NAME, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 1}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        chat = {"model": NAME, "messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0}
        answer = http.post("/v1/chat/completions", json=chat).json()
    first, *others = choice["prompt_logprobs"]
    assert first is None
    for token, row, told in zip(ids[1:], logs, others, strict=True):
        own = told[str(token)]
        assert own["logprob"] == pytest.approx(row[token].item())
        assert own["rank"] == 1 + int((row > row[token]).sum())
        assert own["decoded_token"] == Tokens(tokenizer(), model().config).piece(token)[0]
        best = told[str(int(row.argmax()))]
        assert (best["rank"], best["logprob"]) == (1, pytest.approx(row.max().item()))
    first, *others = answer["prompt_logprobs"]
    assert first is None
    for token, row, told in zip(ids_of(CHAT)[1:], own_logs(ids_of(CHAT)), others, strict=True):
        assert list(told) == [str(token)]
        assert told[str(token)]["logprob"] == pytest.approx(row[token].item())


def test_the_chosen_token_is_among_the_likeliest(live: Live) -> None:
    for count in (0, 1, 2):
        answer = live.openai().completions.create(
            model=NAME, prompt="the", max_tokens=12, seed=3, temperature=2, logprobs=count
        )
        told: Any = answer.choices[0].logprobs
        for name, value, top in zip(
            told.tokens, told.token_logprobs, told.top_logprobs, strict=True
        ):
            assert top[name] == value
            assert count <= len(top) <= count + 1


def test_tokens_of_one_name_are_told_apart() -> None:
    class Same:
        def piece(self, token: int) -> tuple[str, tuple[int, ...]]:
            return ("a" if token < 3 else "b"), ()

    tokens: Any = Same()
    likely = TokenLogprobs(1, -3.0, {0: -1.0, 2: -2.0, 3: -2.5})
    shown = top_by_name(likely, tokens)
    assert shown == {"token_id:0": -1.0, "token_id:2": -2.0, "b": -2.5, "a": -3.0}


def test_a_token_that_nobody_sent_takes_no_room() -> None:
    tokens = Tokens(tokenizer(), model().config)
    ids = ids_of("<|endoftext|>the king")
    assert prompt_offsets(ids, "the king", tokens)[:2] == [0, 0]
    assert prompt_offsets(ids, "<|endoftext|>the king", tokens)[:2] == [0, 13]
