"""`mor generate` as a user runs it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mor.folder.tokenizer import load_tokenizer
from mor.hf.generate import generate_with_depths
from mor.hf.load import load_model
from tests.cli.done import Mor
from tests.strategies import make_model, random_ids, small_config

# Generation ------------------------------------------------------------------------------------


def test_generate_is_generate(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "the king", "--max-new-tokens", 9, "--greedy", "--json"]
    words += ["--ignore-eos"]
    found = json.loads(mor_(*words).out)
    model, tokenizer = load_model(run), load_tokenizer(run)
    ids = tokenizer("the king", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert found["token_ids"] == expected[0, ids.shape[1] :].tolist()
    assert found["text"] == tokenizer.decode(found["token_ids"])
    assert found["prompt"] == "the king"
    # A token's depth is that of the place it was said from.
    depths = model(expected[:, :-1], use_cache=False).depths[0, ids.shape[1] - 1 :].tolist()
    assert found["depths"] == depths
    assert found["mean_depth"] == pytest.approx(sum(depths) / 9)
    assert json.loads(mor_(*words).out)["token_ids"] == found["token_ids"]


def test_depths_are_those_of_the_places_tokens_are_said_from() -> None:
    model = make_model(small_config("threshold"))
    first = []
    for seed in range(8):
        prompt = random_ids(seed, 1, 7)
        ids: list[int] = []
        options = {"max_new_tokens": 5, "do_sample": False}
        tokens, depths = generate_with_depths(
            model, prompt, lambda token, depth, ids=ids: ids.append(token), **options
        )
        assert ids == tokens
        whole = torch.cat((prompt, torch.tensor([tokens])), 1)
        found = model(whole, use_cache=False).depths[0].tolist()
        assert depths == found[6:-1]
        first.append((found[0], found[6]))
    assert any(start != end for start, end in first)  # so that a wrong place would show
    with pytest.raises(ValueError, match=r"must be \[1, T\]"):
        generate_with_depths(model, random_ids(0, 2, 7))


def test_generate_streams_plain_text_into_a_pipe(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "a :heart: [b]", "--max-new-tokens", 30, "--seed", 3]
    done = mor_(*words)
    found = json.loads(mor_(*words, "--json").out)
    assert done.code == 0
    shown = load_tokenizer(run).decode(found["token_ids"], skip_special_tokens=True)
    assert done.out == f"a :heart: [b]{shown}\n"
    assert f"{len(found['token_ids'])} tokens, mean depth" in done.err


def test_sampling_follows_the_seed(mor_: Mor, run: Path) -> None:
    def ids(*words: Any) -> list[int]:
        base = ["generate", run, "--prompt", "my lord", "--max-new-tokens", 20, "--json"]
        return json.loads(mor_(*base, *words).out)["token_ids"]

    assert ids("--seed", 1) == ids("--seed", 1)
    assert ids("--seed", 1) != ids("--seed", 2)
    assert ids("--top-k", 1, "--seed", 1) == ids("--greedy")
    assert ids("--temperature", 0.001, "--min-p", 0.5) == ids("--greedy")
    assert ids("--temperature", 0) == ids("--greedy")


def test_max_depth(mor_: Mor, run: Path) -> None:
    words = ["generate", run, "--prompt", "thou", "--max-new-tokens", 12, "--json"]
    assert set(json.loads(mor_(*words, "--max-depth", 1).out)["depths"]) == {1}
    assert "max_depth=4 must lie in 1..3" in mor_(*words, "--max-depth", 4).error
    assert "max_depth=0 must lie in 1..3" in mor_(*words, "--max-depth", 0).error


def test_prompts(mor_: Mor, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", run, "--max-new-tokens", 3, "--greedy", "--json"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the king"))
    piped = json.loads(mor_(*words, "--prompt", "-").out)
    assert piped["prompt"] == "the king"
    assert piped["token_ids"] == json.loads(mor_(*words, "--prompt", "the king").out)["token_ids"]
    empty = json.loads(mor_(*words).out)
    assert empty["prompt"] == ""
    model = load_model(run)
    expected = model.generate(torch.tensor([[0]]), max_new_tokens=3, do_sample=False)
    assert empty["token_ids"] == expected[0, 1:].tolist()


def test_a_prompt_too_long(mor_: Mor, run: Path) -> None:
    done = mor_("generate", run, "--prompt", "king " * 100)
    assert "max_position_embeddings=64; shorten one of them" in done.error
    done = mor_("generate", run, "--prompt", "king", "--max-new-tokens", 64)
    assert "max_new_tokens=64" in done.error


def test_a_tokenizer_of_another_model(mor_: Mor, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config))
    assert "of another shape" in mor_("generate", folder, "--prompt", "king").error
    small = load_model(run)
    small.resize_token_embeddings(20)
    small.save_pretrained(folder)
    assert "belongs to another model" in mor_("generate", folder, "--prompt", "king").error


@pytest.mark.parametrize(
    "option",
    [
        ("--temperature", -1),
        ("--temperature", 1e-9),
        ("--temperature", "inf"),
        ("--max-new-tokens", 0),
        ("--top-p", 2),
        ("--top-k", -1),
    ],
)
def test_sampling_options_that_cannot_be(mor_: Mor, option: tuple[str, Any], run: Path) -> None:
    done = mor_("generate", run, "--prompt", "king", *option)
    assert done.code == 2
    assert "Traceback" not in done.err
