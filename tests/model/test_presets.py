"""The paper's shapes and their parameter counts, on the meta device: no memory is allocated."""

from __future__ import annotations

import pytest
import torch

from mor import ConfigError, MoRForCausalLM, preset
from mor.config.presets import FAMILIES, SHAPES

# (preset, family, R): millions in all and without the embedding, as the paper rounds them.
COUNTS = {
    ("360m", "vanilla", 1): (361.8, 314.6),
    ("360m", "recursive", 2): (214.3, 167.2),
    ("360m", "recursive", 3): (165.2, 118.0),
    ("360m", "recursive", 4): (145.5, 98.3),
    ("360m", "mor", 3): (165.2, 118.0),
}
# (preset, R): layers of their own, layers unrolled.
DEPTHS = {
    ("135m", 1): ((1, 28, 1), 30),
    ("360m", 1): ((1, 30, 1), 32),
    ("730m", 1): ((1, 24, 1), 26),
    ("1.7b", 1): ((1, 22, 1), 24),
    ("135m", 3): ((1, 10, 1), 32),
    ("360m", 2): ((1, 15, 1), 32),
    ("360m", 3): ((1, 10, 1), 32),
    ("360m", 4): ((1, 8, 1), 34),
    ("730m", 3): ((1, 8, 1), 26),
    ("1.7b", 3): ((1, 8, 1), 26),
}
VOCABULARY, HEAD = 49152, 64


def on_meta(name: str, family: str, recursions: int) -> MoRForCausalLM:
    with torch.device("meta"):
        model = MoRForCausalLM(preset(name, family, recursions))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    return model


def count(model: MoRForCausalLM) -> tuple[int, int]:
    """Unique parameters, in all and without the embedding."""
    total = sum(p.numel() for p in model.parameters())
    return total, total - model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(("name", "family", "recursions"), COUNTS)
def test_parameter_counts_are_the_paper_s(name: str, family: str, recursions: int) -> None:
    total, without_embedding = count(on_meta(name, family, recursions))
    millions = round(total / 1e6, 1), round(without_embedding / 1e6, 1)
    assert millions == COUNTS[name, family, recursions]


@pytest.mark.parametrize(
    ("name", "recursions", "family"),
    [(*k, f) for k in DEPTHS for f in FAMILIES if (f == "vanilla") == (k[1] == 1)],
)
def test_depths_are_the_paper_s_and_every_parameter_is_accounted_for(
    name: str, recursions: int, family: str
) -> None:
    model = on_meta(name, family, recursions)
    config = model.config
    own = (config.num_prelude_layers, config.num_recursion_layers, config.num_coda_layers)
    assert (own, config.num_hidden_layers) == DEPTHS[name, recursions]
    assert config.family == family

    _, hidden, heads, kv_heads, ffn = SHAPES[name]
    attention = 2 * hidden * heads * HEAD + 2 * hidden * kv_heads * HEAD
    layer = attention + 3 * hidden * ffn + 2 * hidden
    routers = recursions * hidden if family == "mor" else 0
    body = sum(own) * layer + hidden + routers
    assert count(model) == (VOCABULARY * hidden + body, body)


def test_shapes_are_the_paper_s() -> None:
    assert SHAPES == {
        "135m": (30, 576, 9, 3, 1536),
        "360m": (32, 960, 15, 5, 2560),
        "730m": (26, 1536, 24, 8, 4096),
        "1.7b": (24, 2048, 32, 32, 8192),
    }
    for name in SHAPES:
        config = preset(name)
        assert (config.vocab_size, config.max_position_embeddings) == (VOCABULARY, 2048)
        assert config.tie_word_embeddings
        assert config.router == "expert_choice"
        assert config.sharing == "middle_cycle"


def test_a_preset_that_does_not_exist() -> None:
    for wrong in (("7b", "mor"), ("360m", "looped"), ("360m", "vanilla", 3)):
        with pytest.raises(ConfigError, match=r"not known; use one of|must be 1"):
            preset(*wrong)
