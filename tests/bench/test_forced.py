from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mor.bench.export import convert_to_llama, export_llama
from mor.bench.forced import bench_config, bench_model, depths_of_tokens
from mor.config.choices import default_capacities
from mor.errors import MorError


@pytest.mark.parametrize("recursions", [2, 3])
def test_every_token_runs_the_depth_that_its_id_says(recursions: int) -> None:
    config = bench_config("tiny", recursions)
    model = bench_model(config)
    wanted = depths_of_tokens(config, 0, default_capacities(recursions))
    ids = torch.arange(config.vocab_size).reshape(4, -1)
    depths = model(ids, use_cache=False, routing="causal").depths
    assert torch.equal(depths, wanted[ids])
    counts = torch.bincount(wanted, minlength=recursions + 1)[1:]
    assert (counts - config.vocab_size / recursions).abs().max() <= 1


def test_other_shares_than_the_default_ones() -> None:
    config = bench_config("tiny", 3)
    model = bench_model(config, capacities=[1.0, 0.5, 0.25])
    depths = model(torch.arange(320)[None], use_cache=False, routing="causal").depths
    assert torch.bincount(depths[0]).tolist() == [0, 160, 80, 80]
    with pytest.raises(MorError, match="3 shares that begin with 1"):
        bench_model(config, capacities=[0.5, 0.5, 0.5])


def test_the_head_does_not_see_the_code() -> None:
    model = bench_model(bench_config("tiny", 3))
    ids = torch.arange(1, 41)[None]
    before = model(ids, use_cache=False, routing="causal").logits
    model.model.lm_head.weight[:, 0] += 100.0  # tied: give the codes another value in the head only
    norm = model.model.norm(torch.randn(1, 4, 128))
    assert (norm[..., 0] == 0).all()
    assert before.isfinite().all()


def test_only_a_threshold_router_can_be_forced() -> None:
    config = bench_config("tiny", 3)
    config.router = "token_choice"
    with pytest.raises(MorError, match="token_choice"):
        bench_model(config)


def test_greedy_text_is_not_one_repeated_token() -> None:
    model = bench_model(bench_config("tiny"))
    ids = torch.arange(10, 18)[:, None]
    with torch.inference_mode():
        for _ in range(12):
            new = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, new), 1)
    assert len({tuple(row) for row in ids[:, 1:].tolist()}) == 8  # each goes its own way
    assert len(set(ids.flatten().tolist())) > 16


def test_seed_and_shape() -> None:
    config = bench_config("tiny")
    assert torch.equal(
        bench_model(config, 1).model.norm.weight, bench_model(config, 2).model.norm.weight
    )
    one, two = (bench_model(config, seed).model.lm_head.weight for seed in (1, 2))
    assert not torch.equal(one, two)
    assert bench_config("tiny", layers=10).num_hidden_layers == 10
    assert bench_config("360m", 4).num_hidden_layers == 34
    with pytest.raises(MorError, match="preset='135'"):
        bench_config("135")


def test_the_export_is_the_same_network(tmp_path: Path) -> None:
    model = bench_model(bench_config("tiny"))
    llama = LlamaForCausalLM.from_pretrained(export_llama(model, tmp_path / "llama"))
    ids = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = model(ids, use_cache=False).logits, llama(ids, use_cache=False).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_only_a_vanilla_model_is_exported() -> None:
    with pytest.raises(MorError, match="vanilla"):
        convert_to_llama(bench_model(bench_config("tiny", 3)))
