"""llama.cpp as a peer: the same greedy tokens as our model, several at a time, in its worker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mor.bench.export import export_llama
from mor.bench.peers import Peer, PeerError
from mor.bench.workload import Ask, Workload
from mor.hf.convert.llama import plain_depth
from tests.strategies import make_model, small_config

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
LOAD = {"max_num_seqs": 2, "max_model_len": 64, "threads": 1}


def peer_of(folder: Path, variant: str) -> Peer:
    (folder / "cache").mkdir(exist_ok=True)
    python = Path(sys.executable)
    return Peer("llamacpp", "llamacpp", variant, python, folder / "llama", folder / "cache", 10)


@pytest.mark.parametrize("variant", ["float32-f32cache", "bfloat16-f32cache"])
def test_the_same_tokens(variant: str, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    # Matrices of 16 bits come in blocks of 32 numbers there.
    model = make_model(small_config("fixed", **plain_depth(3), **WIDTHS))
    model.to(torch.bfloat16).float()  # weights that both variants hold exactly
    export_llama(model, tmp_path / "llama")
    prompts = [(3, 9, 4), (7,), (1, 2, 3, 4, 5)]
    peer = peer_of(tmp_path, variant)
    try:
        peer.load(**LOAD)
        found = peer.run(Workload("w", tuple(Ask(one, 8) for one in prompts), 2))
    finally:
        peer.close()
    assert (tmp_path / "cache" / f"llamacpp-{variant.partition('-')[0]}.gguf").is_file()
    for prompt, trace in zip(prompts, found.traces, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
        tokens, logits = wanted[0, len(prompt) :].tolist(), model(wanted).logits[0]
        for place, (own, theirs) in enumerate(zip(tokens, trace.tokens, strict=True)):
            if own != theirs:  # its products of 16 bits round: only the two best may change places
                at = logits[len(prompt) + place - 1]
                assert variant.startswith("bfloat16")
                assert float(at[own] - at[theirs]) < 0.02
                break


def test_a_variant_that_is_none(tmp_path: Path) -> None:
    peer = peer_of(tmp_path, "int4")
    with pytest.raises(PeerError, match="variant 'int4' is not known; use float32, bfloat16, int8"):
        peer.load(**LOAD)
    peer.close()
