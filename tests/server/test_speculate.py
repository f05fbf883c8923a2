"""A server that guesses tokens says what one that does not would say."""

from __future__ import annotations

from tests.server.live import NAME, Live, make_engine, serving


def test_answers_streams_and_metrics(live: Live) -> None:
    asked = {
        "model": NAME, "prompt": "the king said", "max_tokens": 24, "temperature": 0,
        "stop": ["zz"], "logprobs": 1, "stream": False, "ignore_eos": True,
    }  # fmt: skip
    with live.http() as plain:
        wanted = plain.post("/v1/completions", json=asked).json()["choices"][0]
    with serving(make_engine(speculate=3, speculate_always=True)) as guessing:
        with guessing.http() as client:
            found = client.post("/v1/completions", json=asked).json()["choices"][0]
        with guessing.openai() as openai:
            stream = openai.completions.create(
                model=NAME, prompt="the king said", max_tokens=24, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            chunks = [chunk.choices[0].text for chunk in stream]
        guessing.wait_idle()
        drafts, right, tokens = (
            guessing.metric(f"mor:spec_decode_num_{name}_total")
            for name in ("drafts", "accepted_tokens", "draft_tokens")
        )
        assert guessing.metric("mor:spec_decode_num_speculative_tokens") == 3
    assert found["text"] == wanted["text"] == "".join(chunks)
    assert found["logprobs"]["tokens"] == wanted["logprobs"]["tokens"]
    assert len(found["logprobs"]["tokens"]) == 24
    assert 0 < right < tokens
    assert drafts + right >= 2 * 22  # all but the first token of each answer, and perhaps the last
    assert live.metric("mor:spec_decode_num_drafts_total") == 0
