"""The real ``openai`` client against a live server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from mor.engine import SamplingParams
from tests.server.live import NAME, Live, make_engine, tokenizer

GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "extra_body": {"ignore_eos": True}}


def alone(prompt: str | list[int], **fields: Any) -> Any:
    """The answer of an engine that has nothing else to do."""
    params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | fields)
    (output,) = make_engine().generate(prompt, params)
    return output.completions[0]


def test_models(live: Live) -> None:
    client = live.openai()
    (listed,) = client.models.list().data
    assert listed.id == client.models.retrieve(NAME).id == NAME
    assert listed.num_recursions == 3  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_a_completion(live: Live) -> None:
    answer = live.openai().completions.create(prompt="the king", max_tokens=12, **GREEDY)
    wanted = alone("the king", max_tokens=12)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (wanted.text, "length")
    assert choice.depths == list(wanted.depths)  # type: ignore[attr-defined]
    assert len(set(wanted.depths)) > 1
    assert answer.usage is not None
    asked = len(tokenizer()("the king").input_ids)
    assert answer.usage.model_dump(include={"prompt_tokens", "completion_tokens"}) == {
        "prompt_tokens": asked,
        "completion_tokens": 12,
    }


def test_sixteen_tokens_are_the_default(live: Live) -> None:
    answer = live.openai().completions.create(prompt="the king", **GREEDY)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", ["the king", "東京", "🙂"])
def test_a_stream_is_the_same_text(live: Live, prompt: str) -> None:
    wanted = alone(prompt, max_tokens=30)
    stream = live.openai().completions.create(
        prompt=prompt, max_tokens=30, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    *told, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in told)
    assert "".join(chunk.choices[0].text for chunk in told) == wanted.text
    assert [d for c in told for d in c.choices[0].depths] == list(wanted.depths)  # type: ignore
    assert [c.choices[0].finish_reason for c in told] == [None] * (len(told) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_has_one_chunk_for_each_token(live: Live) -> None:
    chunks = list(
        live.openai().completions.create(prompt="the", max_tokens=9, stream=True, **GREEDY)
    )
    assert [len(chunk.choices[0].depths) for chunk in chunks] == [1] * 9  # type: ignore


def test_no_character_of_a_text_ends_a_line_of_a_stream(live: Live) -> None:
    """Clients split lines as they please, at U+2028 and U+0085 too."""
    strange = "a\u2028b\x85c\x0bd\x1ce\r\nf 東"
    body = {"model": NAME, "prompt": strange, "max_tokens": 3, "echo": True, "stream": True}
    with live.http() as client:
        answer = client.post("/v1/completions", json=body).text
    lines = [line for line in answer.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]]
    assert texts[0] == strange


def test_prompts_of_all_forms(live: Live) -> None:
    client = live.openai()
    texts = ["the king", "my lord", "thou"]
    ids = [tokenizer()(text).input_ids for text in texts]
    wanted = [alone(text, max_tokens=6).text for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(prompt=prompt, max_tokens=6, **GREEDY)  # type: ignore
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
    one = client.completions.create(prompt=ids[0], max_tokens=6, **GREEDY)
    assert one.choices[0].text == wanted[0]


def test_n_completions_of_several_prompts_and_a_seed(live: Live) -> None:
    fields: dict[str, Any] = {"model": NAME, "max_tokens": 8, "n": 3, "seed": 5, "temperature": 1.5}
    answer = live.openai().completions.create(prompt=["the king", "my lord"], **fields)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    params = SamplingParams(max_tokens=8, n=3, seed=5, temperature=1.5)
    outputs = make_engine().generate(["the king", "my lord"], params)
    wanted = [done.text for output in outputs for done in output.completions]
    assert [choice.text for choice in answer.choices] == wanted
    assert len(set(wanted)) > 3
    stream = live.openai().completions.create(prompt=["the king", "my lord"], stream=True, **fields)
    texts = [""] * 6
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == wanted


def test_echo(live: Live) -> None:
    client = live.openai()
    plain = client.completions.create(prompt="the king", max_tokens=5, **GREEDY).choices[0].text
    echo = client.completions.create(prompt="the king", max_tokens=5, echo=True, **GREEDY)
    assert echo.choices[0].text == "the king" + plain
    stream = client.completions.create(
        prompt="the king", max_tokens=5, echo=True, stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "the king" + plain


def test_stop_texts_and_ids(live: Live) -> None:
    client = live.openai()
    free = alone("thou art", max_tokens=20)
    stop = next(free.text[i : i + 2] for i in range(4, 18) if free.text[i : i + 2].isascii())
    cut = free.text[: free.text.find(stop)]
    answer = client.completions.create(prompt="thou art", max_tokens=20, stop=stop, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    assert answer.choices[0].stop_reason == stop  # type: ignore[attr-defined]
    stream = client.completions.create(
        prompt="thou art", max_tokens=20, stop=["zz", stop], stream=True, **GREEDY
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == cut
    own = {"ignore_eos": True, "stop_token_ids": [free.token_ids[3]], "return_token_ids": True}
    answer = client.completions.create(
        prompt="thou art", max_tokens=20, model=NAME, temperature=0, extra_body=own
    )
    ended = free.token_ids.index(free.token_ids[3]) + 1
    assert answer.choices[0].token_ids == list(free.token_ids[:ended])  # type: ignore
    assert answer.choices[0].stop_reason == free.token_ids[3]  # type: ignore[attr-defined]


def test_fields_of_ours_and_of_others(live: Live) -> None:
    client = live.openai()

    def texts(**own: Any) -> Any:
        answer = client.completions.create(
            model=NAME, prompt="the king", max_tokens=10, seed=1, temperature=1.2, extra_body=own
        )
        return answer.choices[0]

    free = texts()
    assert texts(top_k=1).text == texts(min_p=1.0).text == alone("the king", max_tokens=10).text
    assert texts(repetition_penalty=5.0).text != free.text
    assert texts(top_k=-1).text == texts(top_k=0).text == free.text
    assert set(texts(depth_cap=1).depths) <= {0, 1}
    wanted = alone("the king", max_tokens=10, max_depth=2)
    own = {"depth_cap": 2, "ignore_eos": True}
    capped = client.completions.create(
        prompt="the king", max_tokens=10, model=NAME, temperature=0, extra_body=own
    )
    assert capped.choices[0].text == wanted.text
    forced = client.completions.create(
        model=NAME, prompt="the", max_tokens=4, temperature=0, logit_bias={"70": 100},
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    assert forced.choices[0].token_ids == [70] * 4  # type: ignore[attr-defined]


def test_seeds_and_top_p_as_other_servers_take_them(live: Live) -> None:
    client = live.openai()

    def text(**fields: Any) -> str:
        answer = client.completions.create(
            model=NAME, prompt="the king", max_tokens=10, **{"temperature": 1.5} | fields
        )
        return answer.choices[0].text

    assert text(top_p=0) == alone("the king", max_tokens=10).text
    assert text(seed=-7) == text(seed=-7) != text(seed=7)
    assert text(seed=-(2**63)) == text(seed=-(2**63))
    assert len({text(seed=-1) for _ in range(6)}) > 1


def test_logprobs_of_a_completion(live: Live) -> None:
    answer = live.openai().completions.create(prompt="the", max_tokens=12, logprobs=3, **GREEDY)
    choice, wanted = answer.choices[0], alone("the", max_tokens=12, logprobs=3)
    told = choice.logprobs
    assert told is not None
    assert told.token_logprobs == pytest.approx([one.logprob for one in wanted.logprobs])
    assert told.tokens is not None
    raw = b"".join(
        bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
        if name.startswith("bytes:")
        else name.encode()
        for name in told.tokens
    )
    assert raw.decode(errors="replace") == choice.text
    assert told.top_logprobs is not None
    for name, value, top in zip(
        told.tokens, told.token_logprobs or [], told.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[name] == pytest.approx(value) == max(top.values())  # greedy
    offsets = told.text_offset
    assert offsets is not None
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert offsets[-1] <= len(choice.text)
    stream = live.openai().completions.create(
        prompt="the", max_tokens=12, logprobs=3, stream=True, **GREEDY
    )
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [name for part in parts for name in part.tokens] == told.tokens  # type: ignore
    assert [place for part in parts for place in part.text_offset] == offsets  # type: ignore


MESSAGES: Any = [
    {"role": "developer", "content": "be a king"},
    {"role": "user", "content": [{"type": "text", "text": "who "}, {"type": "text", "text": "?"}]},
]
CHAT = "system: be a king\nuser: who ?\nassistant: "


def test_a_chat(live: Live) -> None:
    client = live.openai()
    wanted = alone(CHAT, max_tokens=10)
    answer = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=10, **GREEDY)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", wanted.text)
    assert choice.depths == list(wanted.depths)  # type: ignore[attr-defined]
    stream = client.chat.completions.create(
        messages=MESSAGES, max_tokens=10, stream=True, stream_options={"include_usage": True},
        **GREEDY,
    )  # fmt: skip
    first, *told, usage = stream
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == wanted.text
    assert told[-1].choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.total_tokens == len(tokenizer()(CHAT).input_ids) + 10


def test_a_chat_goes_on_as_long_as_it_fits(live: Live) -> None:
    answer = live.openai().chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.total_tokens == live.engine.max_model_len


def test_logprobs_of_a_chat(live: Live) -> None:
    answer = live.openai().chat.completions.create(
        messages=MESSAGES, max_tokens=8, logprobs=True, top_logprobs=2, **GREEDY
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    wanted = alone(CHAT, max_tokens=8, logprobs=2)
    assert [one.logprob for one in told.content] == pytest.approx(
        [one.logprob for one in wanted.logprobs]
    )
    raw = b"".join(bytes(one.bytes or []) for one in told.content)
    assert raw.decode(errors="replace") == answer.choices[0].message.content
    assert all(len(one.top_logprobs) == 2 for one in told.content)


def test_errors_as_the_client_sees_them(live: Live) -> None:
    client = live.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="the")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt="the king " * 200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=NAME, prompt="the", temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=NAME, prompt="the", extra_body={"depth": 1})
    assert (unknown.value.param, unknown.value.code) == ("depth", "unknown_field")
    with pytest.raises(openai.BadRequestError, match="begins with the user"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "assistant", "content": "hm"}]
        )
