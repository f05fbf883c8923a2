"""``generate()`` through the cache writes what the full causal forward says, token by token."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from packaging.version import Version
from torch import Tensor
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from mor import MoRCache, MoRConfig, MoRForCausalLM
from mor.hf.arguments import CACHE_NAME
from tests.strategies import (
    KV_SHARING,
    ROUTED,
    ROUTERS,
    SEEDS,
    VOCAB,
    configs,
    make_model,
    random_ids,
    small_config,
)

NEW = 5
# No token of the tests ends a text by chance: ids are drawn below, padding is told by the mask.
QUIET = {"pad_token_id": 0, "max_new_tokens": NEW, "do_sample": False}


def prompts(seed: int, *shape: int) -> Tensor:
    return 1 + random_ids(seed, *shape) % (VOCAB - 1)


def write(model: MoRForCausalLM, ids: Tensor, **how: Any) -> Tensor:
    how = QUIET | {"attention_mask": torch.ones_like(ids)} | how
    return model.generate(ids, **how)


def argmax(model: MoRForCausalLM, ids: Tensor, count: int = NEW, **how: Any) -> Tensor:
    """Greedy decoding as it is defined: the whole forward again for every token."""
    for _ in range(count):
        with torch.no_grad():
            logits = model(ids, use_cache=False, routing="causal", **how).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_greedy_is_the_argmax_of_the_full_forward(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), 1)
    ids = prompts(0, 2, 5)
    wanted = argmax(model, ids)
    assert torch.equal(write(model, ids), wanted)
    assert torch.equal(write(model, ids, use_cache=False), wanted)
    model.train()  # whoever forgets eval() gets training's selection, but no error
    assert write(model, ids).shape == wanted.shape


@given(configs(), SEEDS)
def test_greedy_of_any_model(config: MoRConfig, seed: int) -> None:
    model = make_model(config, seed, torch.float64)
    ids = prompts(seed, 2, 3)
    assert torch.equal(write(model, ids), argmax(model, ids))


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_left_padded_batch_writes_what_each_row_would(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), 2)
    rows = [prompts(seed, length) for seed, length in enumerate((7, 2))]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, 7 - len(row) :], mask[place, 7 - len(row) :] = row, 1
    batch = write(model, ids, attention_mask=mask)
    without = write(model, ids, attention_mask=mask, use_cache=False)
    assert torch.equal(batch, without)
    for row, written in zip(rows, batch, strict=True):
        assert torch.equal(written[7 - len(row) :], write(model, row[None])[0])


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_beams_with_and_without_a_cache(router: str, kv_sharing: str) -> None:
    model = make_model(small_config(router, kv_sharing), 3)
    ids = prompts(0, 2, 5)
    how: dict[str, Any] = {
        "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0,
        "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip
    cached, plain = write(model, ids, **how), write(model, ids, use_cache=False, **how)
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences.shape == (4, 5 + NEW)
    assert len({tuple(row) for row in cached.sequences.tolist()}) == 4
    # The score of a beam is the log-probability of what it wrote.
    for sequence, score in zip(cached.sequences, cached.sequences_scores, strict=True):
        with torch.no_grad():
            logs = model(sequence[None], use_cache=False).logits[0].log_softmax(-1)
        own = logs[4:-1].gather(-1, sequence[5:, None]).sum()
        assert float(own) == pytest.approx(float(score), abs=1e-3)


@pytest.mark.parametrize("router", ROUTERS)
def test_sampling_is_repeatable_and_does_not_hang_on_the_cache(router: str) -> None:
    model = make_model(small_config(router, initializer_range=0.1), 4)
    ids = prompts(0, 2, 5)
    how = {"do_sample": True, "temperature": 1.3, "top_k": 20, "num_return_sequences": 3}
    texts = []
    for seed, use_cache in ((0, True), (0, True), (0, False), (1, True)):
        torch.manual_seed(seed)
        texts.append(write(model, ids, use_cache=use_cache, **how))
    assert texts[0].shape == (6, 5 + NEW)
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[3])
    assert not torch.equal(texts[0][0], texts[0][1])  # returned sequences are drawn apart
    assert (texts[0][:3, :5] == ids[0]).all()


class Listener(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("router", ROUTERS)
def test_a_stream_brings_the_same_tokens(router: str) -> None:
    model = make_model(small_config(router), 5)
    ids = prompts(0, 1, 5)
    listener = Listener()
    written = write(model, ids, streamer=listener)
    assert listener.heard == written[0].tolist()
    assert listener.ended


class Letters:
    """A tokenizer of one letter per id, as far as a streamer needs one."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + int(i)) for i in ids)


def test_text_comes_through_the_iterator_of_transformers() -> None:
    model = make_model(small_config("threshold"), 5)
    ids = prompts(0, 1, 5)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True, timeout=30)  # type: ignore[arg-type]
    how = QUIET | {"attention_mask": torch.ones_like(ids), "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs=how)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == Letters().decode(write(model, ids)[0, 5:].tolist())
    assert len([piece for piece in pieces if piece]) > 1


@pytest.mark.parametrize("router", ROUTED)
def test_the_cache_that_comes_back_shows_what_was_saved(router: str) -> None:
    model = make_model(small_config(router), 6)
    ids = prompts(0, 2, 12)
    out = write(model, ids, return_dict_in_generate=True, max_new_tokens=20)
    cache = getattr(out, CACHE_NAME)
    assert isinstance(cache, MoRCache)
    assert cache.get_seq_length() == 12 + 20 - 1  # the last token is written, not read
    assert 0 < cache.nbytes() < cache.vanilla_nbytes()
    with torch.no_grad():
        depths = model(out.sequences[:, :-1], use_cache=False).depths
    assert [int(g.lengths.sum()) for g in cache.depths] == [
        int((depths > depth).sum()) for depth in range(3)
    ]


@pytest.mark.parametrize("kv_sharing", KV_SHARING)
def test_a_conversation_goes_on_with_its_cache(kv_sharing: str) -> None:
    model = make_model(small_config("threshold", kv_sharing), 7)
    cache = MoRCache(model.config)
    first = write(model, prompts(0, 1, 5), **{CACHE_NAME: cache})
    joined = torch.cat((first, prompts(1, 1, 4)), 1)
    assert torch.equal(write(model, joined, **{CACHE_NAME: cache}), argmax(model, joined))
    assert cache.get_seq_length() == joined.shape[1] + NEW - 1


@pytest.mark.parametrize("router", ["expert_choice", "token_choice"])
def test_a_depth_cap_passes_through(router: str) -> None:
    model = make_model(small_config(router), 8)
    ids = prompts(0, 2, 5)
    texts = [write(model, ids, max_depth=cap) for cap in (1, 2, 3)]
    for cap, text in zip((1, 2, 3), texts, strict=True):
        assert torch.equal(text, argmax(model, ids, max_depth=cap))
    assert not torch.equal(texts[0], texts[2])


def test_texts_that_end_early_wait_for_the_others() -> None:
    model = make_model(small_config("threshold"), 9)
    ids = prompts(0, 3, 5)
    free = write(model, ids)
    stop = int(free[0, 7])
    ended = write(model, ids, eos_token_id=stop)
    for row in range(3):
        text = free[row, 5:].tolist()
        kept = text[: text.index(stop) + 1] if stop in text else text
        assert ended[row, 5 : 5 + len(kept)].tolist() == kept
        assert (ended[row, 5 + len(kept) :] == 0).all()


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.11"),
    reason="Transformers 5.10 cannot look up in a prompt without an end-of-text token",
)
def test_prompt_lookup_takes_back_what_was_guessed_wrong() -> None:
    """Transformers' own speculative decoding relies on crop."""
    model = make_model(small_config("threshold", "recursive_update"), 10)
    ids = prompts(0, 1, 4).repeat(1, 3)
    found = write(model, ids, prompt_lookup_num_tokens=3, max_new_tokens=16)
    assert torch.equal(found, argmax(model, ids, 16))


@pytest.mark.parametrize("router", ["fixed", "threshold", "token_choice"])
def test_an_assistant_changes_no_token(router: str) -> None:
    model, assistant = make_model(small_config(router), 10), make_model(small_config("fixed"), 1)
    ids = prompts(0, 1, 6)
    how = {"max_new_tokens": 12, "eos_token_id": VOCAB - 1}
    found = write(model, ids, assistant_model=assistant, **how)
    assert torch.equal(found, write(model, ids, use_cache=False, **how))
    assert torch.equal(found, write(model, ids, cache_implementation="dynamic", **how))


# The random router's gates are drawn anew at each training step, by design.
@pytest.mark.parametrize("router", [router for router in ROUTED if router != "random"])
def test_training_mode_writes_the_same_and_takes_no_note(router: str) -> None:
    """A trainer may write texts between its steps: each token decides for itself then, too."""
    model = make_model(small_config(router))
    ids = prompts(3, 2, 7)
    wanted = write(model, ids)
    kept = {name: value.clone() for name, value in model.model.router.state_dict().items()}
    model.train()
    assert torch.equal(write(model, ids), wanted)
    model.model.router.finish_step()
    now = model.model.router.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in kept.items())
    assert write(model, ids, routing="full").shape == wanted.shape


def test_prompts_may_be_embeddings_or_come_in_chunks() -> None:
    model = make_model(small_config("expert_choice", "recursive"), 11)
    ids = prompts(0, 2, 7)
    wanted = argmax(model, ids)
    embeds = model.get_input_embeddings()(ids).detach()
    found = model.generate(inputs_embeds=embeds, **QUIET | {"attention_mask": torch.ones_like(ids)})
    assert torch.equal(found, wanted[:, 7:])
    assert torch.equal(write(model, ids, prefill_chunk_size=3), wanted)


def test_another_cache_implementation_is_refused() -> None:
    model = make_model(small_config("fixed"))
    with pytest.raises(ValueError, match="cache_implementation='static' is not available"):
        write(model, prompts(0, 1, 3), cache_implementation="static")
