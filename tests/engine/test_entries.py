"""Keys and values in bfloat16 or as bytes: the kernels keep what the plain form keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import mor
from mor.engine import Engine, SamplingParams
from mor.engine.attend import row_attention
from mor.engine.entries import entry_bytes, entry_type, pack, unpack
from mor.engine.memory import pages_that_fit
from mor.errors import MorError
from mor.ops import native
from mor.ops.native import Ragged, paged_attention
from tests.engine.oracle import greedy
from tests.strategies import KV_SHARING, make_model, random_ids, small_config

TYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
PROMPTS = [random_ids(i, 5 + 9 * i).tolist() for i in range(4)]
needs_kernels = pytest.mark.skipif(native.library() is None, reason=native.missing())


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Heads of very different size, one of them all zeros, and ties between two bytes."""
    torch.manual_seed(seed)
    x = torch.randn(shape) * 10.0 ** torch.randint(-6, 2, (*shape[:-1], 1))
    x[0, 0] = 0
    x[1, 0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
    x[1, 0, 4:] = 0
    return x


@given(seed=st.integers(0, 1000), head_dim=st.sampled_from([6, 16]))
def test_a_byte_is_off_by_half_a_step(seed: int, head_dim: int) -> None:
    x = numbers(seed, 5, 2, head_dim)
    kept, scales = pack(x, torch.int8)
    assert scales is not None
    assert kept[1, 0, :4].tolist() == [127, 0, 2, -2]
    off = (unpack(kept, scales, torch.float64) - x.double()).abs()
    assert bool((off <= scales[..., None] * 0.5001).all())
    assert_close(unpack(*pack(x, torch.bfloat16), x.dtype), x, rtol=2**-8, atol=0.0)
    assert torch.equal(unpack(*pack(x, x.dtype), x.dtype), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept_as", [torch.int8, torch.float8_e4m3fn])
def test_no_largest_number_leaves_its_type(dtype: torch.dtype, kept_as: torch.dtype) -> None:
    """In 16 bits 127 of them rounds up to 128, which would come back as -128."""
    torch.manual_seed(0)
    x = torch.randn(4000, 1, 8).to(dtype)
    back = unpack(*pack(x, kept_as), torch.float64)
    largest = x.double().abs().amax(-1, keepdim=True)
    off = ((back - x.double()).abs() / largest).max()
    assert off < (0.5001 / 127 if kept_as == torch.int8 else 2**-4)
    assert_close(back.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0.0)


@needs_kernels
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("head_dim", native.HEAD_DIMS)
@torch.no_grad()
def test_the_kernels_keep_the_same_bits(name: str, head_dim: int) -> None:
    count, page_size, heads = 37, 5, 2
    key, value = numbers(1, count, heads, head_dim), numbers(2, count, heads, head_dim)
    table = torch.randperm(8)[None, None]
    slots = table[0, 0, torch.arange(count) // page_size] * page_size
    slots = slots + torch.arange(count) % page_size
    shape = (8 * page_size, heads, head_dim)
    pool = [torch.zeros(shape, dtype=TYPES[name]) for _ in range(2)]
    scales = (torch.full(shape[:2], torch.nan), torch.full(shape[:2], torch.nan))
    place, row = torch.arange(count), torch.zeros(count, dtype=torch.long)
    batch = Ragged(
        *pool, table, page_size, row, place, place, row[:1], torch.tensor([count]),
        scales if name == "int8" else None,
    )  # fmt: skip
    query = torch.randn(count, 4, head_dim) / 100
    mixed = paged_attention(query, key, value, batch, 0)
    read = []
    for fresh, kept, own in zip((key, value), pool, scales, strict=True):
        wanted, wanted_scales = pack(fresh, TYPES[name])
        assert torch.equal(kept[slots], wanted)
        if wanted_scales is not None:
            assert torch.equal(own[slots], wanted_scales)
        read.append(unpack(wanted, wanted_scales, torch.float64).transpose(0, 1)[None])
    seen = torch.ones(count, count).tril().bool()
    plain = torch.nn.functional.scaled_dot_product_attention(
        query.double().transpose(0, 1)[None], *read, attn_mask=seen, enable_gqa=True
    )
    wanted = plain[0].transpose(0, 1)
    size = wanted.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # one head is all zeros
    assert_close(mixed / size, wanted / size, rtol=0.0, atol=2e-4, check_dtype=False)


@needs_kernels
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_the_engine_over_kernels_and_over_plain_forms(name: Any, kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing, head_dim=16))
    asked = greedy(4, logprobs=1)
    found = []
    for attention in (None, row_attention):
        engine = Engine(model, kv_cache_dtype=name, page_size=4, attention=attention)
        found.append([out.completions[0] for out in engine.generate(PROMPTS, asked)])
    for own, plain in zip(*found, strict=True):
        assert (own.token_ids, own.depths) == (plain.token_ids, plain.depths)
        assert own.logprobs is not None
        assert plain.logprobs is not None
        for one, other in zip(own.logprobs, plain.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


@pytest.mark.parametrize("name", [*TYPES, "fp8"])
def test_shared_pages_bring_their_scales(name: Any) -> None:
    model = make_model(small_config("threshold", "recursive_update", head_dim=16))
    knobs: dict[str, Any] = {"kv_cache_dtype": name, "page_size": 3}
    asked = greedy(4, logprobs=2)
    alone = Engine(model, prefix_caching=False, **knobs).generate(PROMPTS[2], asked)[0]
    shared = Engine(model, **knobs)
    for _ in range(2):
        done = shared.generate(PROMPTS[2], asked)[0].completions[0]
        assert done.token_ids == alone.completions[0].token_ids
        if native.library() is not None and name in TYPES:
            assert done.logprobs == alone.completions[0].logprobs
    assert done.cached_tokens > 0


def test_bytes_per_token_and_pages_in_the_same_memory() -> None:
    """A head of 64 numbers: 256 bytes, 128, or 64 and a scale of 4."""
    model = make_model(small_config("fixed", head_dim=64))
    config, used = model.config, {}
    for name in ("auto", *TYPES, "fp8"):
        engine = Engine(model, kv_cache_dtype=name, max_model_len=40)  # type: ignore[arg-type]
        engine.add_request(PROMPTS[0], greedy(5))
        engine.step()
        used[name] = engine.kv_bytes()
        engine.abort("request-0")
        assert engine.store.pool.nbytes() == engine.store.pool.num_pages * 16 * entry_bytes(
            config.num_key_value_heads,
            64,
            entry_type(name, torch.float32),  # type: ignore[arg-type]
        )
    assert used["auto"] == 2 * used["bfloat16"]
    assert used["auto"] * 68 == used["int8"] * 256
    assert used["fp8"] == used["int8"]
    sizes = [
        pages_that_fit(config, 3, 16, 10**12, 0.5, dtype, torch.device("cpu"))
        for dtype in (torch.float32, torch.int8)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(256 / 68, rel=0.05)


def test_a_type_that_is_not_known() -> None:
    model = make_model(small_config("fixed"))
    with pytest.raises(MorError, match=r"kv_cache_dtype='fp4' .* auto, bfloat16, int8, fp8"):
        Engine(model, kv_cache_dtype="fp4")  # type: ignore[arg-type]


def test_answers_of_the_shipped_model_stay() -> None:
    """Negative log-likelihood of what it answers, each token given those before."""
    folder = Path(mor.__file__).parent / "shipped" / "hops"
    exact = Engine(folder, max_num_seqs=8)
    draw = torch.Generator().manual_seed(3)
    size = exact.config.vocab_size
    prompts = [torch.randint(size, (30,), generator=draw).tolist() for _ in range(6)]
    asked = greedy(12, logprobs=0, ignore_eos=True)
    answers = [out.completions[0] for out in exact.generate(prompts, asked)]
    plain = [one.logprob for done in answers for one in done.logprobs or ()]
    for name, most in (("bfloat16", 0.01), ("int8", 0.02), ("fp8", 0.03)):
        engine = Engine(folder, max_num_seqs=8, kv_cache_dtype=name)  # type: ignore[arg-type]
        found = []
        for prompt, done in zip(prompts, answers, strict=True):
            for place, token in enumerate(done.token_ids):
                forced = SamplingParams(
                    max_tokens=1, temperature=0.0, logprobs=0, logit_bias={token: 100.0}
                )
                (out,) = engine.generate([*prompt, *done.token_ids[:place]], forced)
                (only,) = out.completions[0].logprobs or ()
                assert only.token == token
                found.append(only.logprob)
        assert abs(sum(found) - sum(plain)) / len(plain) < most
