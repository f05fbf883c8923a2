"""The paper's shapes: 135m, 360m, 730m and 1.7b as vanilla, recursive and MoR models."""

from __future__ import annotations

from typing import Any

from mor.config import ConfigError, MoRConfig

# layers, hidden, heads, KV heads, FFN (paper appendix, table of architectures); head size 64.
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "135m": (30, 576, 9, 3, 1536),
    "360m": (32, 960, 15, 5, 2560),
    "730m": (26, 1536, 24, 8, 4096),
    "1.7b": (24, 2048, 32, 32, 8192),
}
FAMILIES = ("vanilla", "recursive", "mor")


def divisible_depth(num_layers: int, num_recursions: int, private: int = 2) -> int:
    """Smallest unrolled depth >= ``num_layers`` whose shared part divides by ``num_recursions``.

    The paper's own choice: 32 layers stay 32 at R = 2 and 3 and become 34 at R = 4.
    """
    shared = num_layers - private
    return private + -(-shared // num_recursions) * num_recursions


def preset(
    name: str, family: str = "mor", num_recursions: int | None = None, **overrides: Any
) -> MoRConfig:
    """A configuration of the paper: vocabulary 49,152, context 2,048, tied head, middle_cycle.

    Args:
        name: ``135m``, ``360m``, ``730m`` or ``1.7b``.
        family: ``vanilla``, ``recursive`` or ``mor`` (expert choice unless ``router`` says else).
        num_recursions: R; default 3 (1 for vanilla).
        overrides: any field of :class:`MoRConfig`.

    Raises:
        ConfigError: an unknown name or family, or a wrong override.
    """
    if name not in SHAPES:
        raise ConfigError(f"preset={name!r} is not known; use one of: {', '.join(SHAPES)}")
    if family not in FAMILIES:
        raise ConfigError(f"family={family!r} is not known; use one of: {', '.join(FAMILIES)}")
    layers, hidden, heads, kv_heads, ffn = SHAPES[name]
    if family == "vanilla":
        if num_recursions not in (None, 1):
            raise ConfigError(f"num_recursions={num_recursions} must be 1 for family='vanilla'")
        recursions, unrolled = 1, layers
    else:
        recursions = 3 if num_recursions is None else num_recursions
        if recursions < 1:
            raise ConfigError(f"num_recursions={recursions} must be at least 1")
        unrolled = divisible_depth(layers, recursions)
    fields: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "num_recursions": recursions,
        "num_prelude_layers": 1,
        "num_recursion_layers": (unrolled - 2) // recursions,
        "num_coda_layers": 1,
        "sharing": "middle_cycle",
        "router": "expert_choice" if family == "mor" else "fixed",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if "num_hidden_layers" in overrides:
        del fields["num_recursion_layers"]
    return MoRConfig(**(fields | overrides))
