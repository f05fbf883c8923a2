from __future__ import annotations

import statistics
from typing import Any

import pytest

from mor.bench.workload import Lengths, Workload, make_workload
from mor.errors import MorError


def made(kind: Any = "paper", requests: int = 400, seed: int = 0, **fields: Any) -> Workload:
    lengths = Lengths(**fields)
    return make_workload(kind, requests, 32, 1000, lengths, seed)


def test_the_seed_decides_every_request() -> None:
    assert made() == made()
    assert made().asks != made(seed=1).asks
    assert made("protocol").asks == made().asks  # the same requests, in other batches


def test_output_lengths_are_normal_with_the_given_mean_and_scale() -> None:
    lengths = [ask.new_tokens for ask in made(requests=2000).asks]
    assert abs(statistics.fmean(lengths) - 256) < 6
    assert abs(statistics.stdev(lengths) - 64) < 4
    half = [ask.new_tokens for ask in made(requests=2000, scale=0.5).asks]
    assert abs(statistics.fmean(half) - 128) < 3
    wild = [ask.new_tokens for ask in made(requests=2000, deviation=500.0).asks]
    assert min(wild) == 1
    assert max(wild) == 512


def test_prompts_have_the_asked_lengths_and_known_ids() -> None:
    assert {len(ask.prompt) for ask in made().asks} == {1}
    assert {len(ask.prompt) for ask in made(prompt=8).asks} == {8}
    sizes = [len(ask.prompt) for ask in made("prompts").asks]
    assert min(sizes) >= 64
    assert max(sizes) <= 512
    assert max(sizes) - min(sizes) > 300
    assert all(1 <= token < 1000 for ask in made("prompts").asks for token in ask.prompt)


def test_prompts_are_cut_from_the_text_that_is_given() -> None:
    text = list(range(5000, 5100))
    lengths = Lengths(prompt_low=3, prompt_high=5)
    asks = make_workload("prompts", 20, 2, 9000, lengths, text=text).asks
    assert all(list(a.prompt) == text[a.prompt[0] - 5000 :][: len(a.prompt)] for a in asks)
    with pytest.raises(MorError, match="too few"):
        make_workload("prompts", 1, 2, 9000, lengths, text=[1])


def test_counts_and_sizes() -> None:
    workload = made(requests=3)
    assert workload.output_tokens == sum(ask.new_tokens for ask in workload.asks)
    assert workload.longest == 1 + max(ask.new_tokens for ask in workload.asks)
    assert workload.sizes(3, True) == (32, {"max_num_seqs": 32, "max_residents": 32})
    assert made("latency").sizes(3, True)[0] == 1
    capped = make_workload("paper", 3, 64, 1000, Lengths(), pass_tokens=48)
    assert capped.sizes(1, False) == (64, {"max_num_seqs": 48, "max_residents": 64})


def test_the_papers_protocol_fills_passes_and_gatherings() -> None:
    relative = ((2, 42), (3, 48), (4, 51))
    workload = make_workload("protocol", 3, 32, 1000, Lengths(), relative=relative)
    full = {"max_num_seqs": 48, "max_residents": 96, "min_gather": 48}
    assert workload.sizes(3, True) == (96, full)
    plain = {"max_num_seqs": 32, "max_residents": 32, "min_gather": 32}
    assert workload.sizes(1, False) == (32, plain)
    fixed = make_workload("protocol", 3, 32, 1000, Lengths())
    assert fixed.sizes(4, True)[1]["max_num_seqs"] == 32
    assert fixed.name != workload.name


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        ("papers", {}, "kind|workload='papers'"),
        ("paper", {"mean": 0.0}, "mean_tokens=0.0"),
        ("paper", {"scale": 0.0}, "scale=0.0"),
        ("paper", {"prompt": 0}, "prompt_tokens=0"),
        ("paper", {"prompt_low": 9, "prompt_high": 8}, "prompt_low=9"),
        ("paper", {"longest": 100}, "takes 100; use a smaller --scale"),
    ],
)
def test_wrong_values_are_named(kind: str, fields: dict[str, Any], match: str) -> None:
    with pytest.raises(MorError, match=match):
        made(kind, **fields)
