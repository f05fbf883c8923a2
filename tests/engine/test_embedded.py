"""Prompts with embeddings: answers are those of ``generate`` with the same ``inputs_embeds``."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from mor import MoRForCausalLM
from mor.engine import EmbeddedPrompt, Engine
from mor.engine.memory import pages_for
from mor.errors import MorError
from tests.engine.oracle import greedy, idle, run
from tests.strategies import make_model, random_ids, small_config

IMAGE = 7  # stands where an embedding is read
TEXT = random_ids(5, 40).tolist()


@cache
def model_of(router: str) -> MoRForCausalLM:
    return make_model(small_config(router), 3, torch.float64)


def patches(count: int, seed: int) -> Tensor:
    """Rows that are no token's embedding."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, 32, generator=made, dtype=torch.float64)


def with_image(before: int, seed: int, count: int = 6, after: int = 5) -> EmbeddedPrompt:
    """Text, an image of ``count`` patches, text."""
    ids = [*TEXT[:before], *[IMAGE] * count, *TEXT[20 : 20 + after]]
    return EmbeddedPrompt(ids, patches(count, seed), range(before, before + count))


def whole(model: MoRForCausalLM, prompt: EmbeddedPrompt) -> Tensor:
    """[1, T, D] what the network reads of ``prompt``."""
    with torch.no_grad():
        embeds = model.model.embed(torch.tensor([list(prompt)]))
    embeds[0, list(prompt.places)] = prompt.embeddings
    return embeds


def check(model: MoRForCausalLM, prompt: EmbeddedPrompt, output: Any, new: int) -> None:
    """Tokens and depths of ``output`` are those of ``generate`` alone."""
    embeds = whole(model, prompt)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    generate: Any = model.generate
    written = generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )[0].tolist()  # fmt: skip
    with torch.no_grad():
        rest = model.model.embed(torch.tensor([written[:-1]]))
        out = model(inputs_embeds=torch.cat([embeds, rest], 1), routing="causal", use_cache=False)
    depths = out.depths[0].tolist()
    for done in output.completions:
        assert list(done.token_ids) == written
        assert list(done.prompt_depths) == depths[: len(prompt)]
        assert list(done.depths) == depths[len(prompt) - 1 :]


@pytest.mark.parametrize(
    ("router", "chunk"),
    [("threshold", 3), ("threshold", 64), ("expert_choice", 5), ("token_choice", 3), ("fixed", 4)],
)
def test_greedy_tokens_are_those_of_generate_in_a_batch(router: str, chunk: int) -> None:
    model = model_of(router)
    engine = Engine(model, page_size=4, max_model_len=40, prefill_chunk=chunk, max_num_seqs=3)
    prompts = [
        with_image(4, 1), with_image(0, 2, count=9), with_image(7, 3, after=0),
        EmbeddedPrompt([0] * 5, patches(5, 4)),
    ]  # fmt: skip
    plain = TEXT[:11]
    *outputs, text = engine.generate([*prompts, plain], greedy(5))
    for prompt, output in zip(prompts, outputs, strict=True):
        check(model, prompt, output, 5)
        assert list(output.prompt_token_ids) == list(prompt)
    ids = torch.tensor([plain])
    mask = torch.ones_like(ids)
    generate: Any = model.generate
    alone = generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False,
                           pad_token_id=0, eos_token_id=None)  # fmt: skip
    assert [*plain, *text.completions[0].token_ids] == alone[0].tolist()
    idle(engine)


def test_stages_over_static_buffers_read_them_too() -> None:
    model = model_of("threshold")
    engine = Engine(model, page_size=4, max_model_len=40, static_stages=True, max_num_seqs=2)
    prompts = [with_image(4, 1), with_image(2, 3, after=1)]
    *outputs, _ = engine.generate([*prompts, TEXT[:11]], greedy(4))
    for prompt, output in zip(prompts, outputs, strict=True):
        check(model, prompt, output, 4)
    idle(engine)


def test_one_that_gives_way_reads_its_embeddings_again() -> None:
    model = model_of("fixed")
    pages = pages_for(model.config, 18, 3, 1)
    engine = Engine(model, page_size=1, num_pages=pages, max_model_len=24)
    prompts = [with_image(1, seed, count=3, after=1) for seed in range(4)]
    outputs = engine.generate(prompts, greedy(8))
    assert engine.stats.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        check(model, prompt, output, 8)
    idle(engine)


def test_cached_prefixes_are_found_by_the_bytes_of_the_embeddings() -> None:
    model = model_of("threshold")
    engine = Engine(model, page_size=4, max_model_len=40)

    def cached(prompt: EmbeddedPrompt | list[int]) -> int:
        (output,) = engine.generate(prompt, greedy(3))
        if isinstance(prompt, EmbeddedPrompt):
            check(model, prompt, output, 3)
        return output.completions[0].cached_tokens

    assert cached(with_image(4, 1)) == 0
    assert cached(with_image(4, 1)) == 12  # of 15 places, whole pages
    assert cached(with_image(4, 1, after=3)) == 12
    assert cached(with_image(4, 2)) == 4  # the text before another image
    assert cached(list(with_image(4, 1))) == 4  # the placeholders as plain tokens
    other = with_image(4, 1)
    other.embeddings[5, 31] += 1e-12
    assert cached(other) == 8  # the page before the one that differs
    moved = EmbeddedPrompt(list(with_image(4, 1)), patches(6, 1)[1:], range(5, 10))
    assert cached(moved) == 4
    engine.forget_prefixes()
    idle(engine)


def test_completions_of_one_image_read_it_once_and_own_a_copy_of_it() -> None:
    model = model_of("threshold")
    engine = Engine(model, page_size=4, max_model_len=40, max_num_seqs=2)
    prompt = with_image(2, 1)
    engine.add_request(prompt, greedy(4, n=3), "one")
    kept = prompt.embeddings.clone()
    prompt.embeddings.zero_()  # what comes later is the caller's business
    output = run(engine)["one"]
    check(model, EmbeddedPrompt(list(prompt), kept, prompt.positions), output, 4)
    assert engine.stats.entry_tokens < 2 * len(prompt) + 9


def test_log_probabilities_are_told_of_tokens_only() -> None:
    model, prompt = model_of("fixed"), with_image(3, 1, count=4)
    (output,) = Engine(model, prefill_chunk=4).generate(prompt, greedy(1, prompt_logprobs=0))
    told = output.completions[0].prompt_logprobs
    assert told is not None
    with torch.no_grad():
        logits = model(inputs_embeds=whole(model, prompt), routing="causal").logits[0]
    logs = logits.double().log_softmax(-1)
    for place, one in enumerate(told):
        assert (one is None) == (place in (0, 3, 4, 5, 6))
        if one is not None:
            assert one.token == prompt[place]
            assert one.logprob == pytest.approx(logs[place - 1, one.token].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"embeddings": patches(2, 1)}, "2 rows for 3 positions"),
        ({"embeddings": patches(3, 1)[:, :31]}, "hidden_size=32"),
        ({"embeddings": patches(3, 1).long()}, "floating point"),
        ({"embeddings": patches(3, 1)[None]}, r"\[1, 3, 32\]"),
        ({"embeddings": [[0.0]]}, "list"),
        ({"embeddings": patches(3, 1) / 0}, "not finite"),
        ({"positions": [0, 2, 1]}, "must rise"),
        ({"positions": [0, 0, 1]}, "must rise"),
        ({"positions": [-1, 0, 1]}, r"0\.\.3"),
        ({"positions": [0, 1, 4]}, r"0\.\.3"),
        ({"positions": [0, 1, True]}, "whole numbers"),
        ({"positions": [0, 1, 2.0]}, "whole numbers"),
        ({"token_ids": [1, 2, 3, 61]}, "vocab_size=61"),
        ({"token_ids": [], "positions": [], "embeddings": patches(0, 1)}, "empty"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], match: str) -> None:
    engine = _engine()
    right: dict[str, Any] = {
        "token_ids": [1, 2, 3, 4],
        "embeddings": patches(3, 1),
        "positions": [0, 1, 2],
    }
    with pytest.raises(MorError, match=match):
        engine.add_request(EmbeddedPrompt(**right | fields))
    assert engine.unfinished == 0


@cache
def _engine() -> Engine:
    return Engine(model_of("fixed"), max_model_len=40)
