"""A vanilla model to fold, and quiet ways to fold it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mor import MoRConfig, MoRForCausalLM
from mor.hf.convert.llama import plain_depth
from mor.hf.fold.fold import fold
from mor.hf.fold.plan import Folding
from tests.hf.test_convert_llama import word_tokenizer
from tests.strategies import make_model, small_config

RICH = {"attention_bias": True, "mlp_bias": True, "use_qk_norm": True}


def vanilla(layers: int = 8, **fields: Any) -> MoRForCausalLM:
    """A random vanilla model in which biases and norms do something."""
    config = small_config("fixed", **plain_depth(layers) | fields)
    model = make_model(config, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model


def folded_quietly(model: MoRForCausalLM, folding: Folding) -> MoRForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fold(model, folding)


def stack_of(model: MoRForCausalLM) -> list[nn.Module]:
    inner = model.model
    return [*inner.prelude_layers, *inner.block, *inner.coda_layers]


def only(model: MoRForCausalLM, kept: list[int]) -> MoRForCausalLM:
    """The vanilla model of the layers ``kept``."""
    fields = model.config.to_dict() | plain_depth(len(kept))
    fields.pop("num_hidden_layers", None)
    cut = MoRForCausalLM(MoRConfig(**fields)).eval()
    cut.load_state_dict(model.state_dict(), strict=False)
    for ours, layer in zip(stack_of(cut), kept, strict=True):
        ours.load_state_dict(stack_of(model)[layer].state_dict())
    return cut


def save_vanilla(folder: Path, layers: int = 8, words: int = 61, **fields: Any) -> Path:
    model = vanilla(layers, **fields)
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    word_tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
