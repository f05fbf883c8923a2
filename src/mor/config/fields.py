"""The fields of a configuration: names, types, defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from mor.config.choices import (
    Balancing,
    DecisionRule,
    KVSharing,
    Objective,
    RecursionScale,
    RecursionSeam,
    Relaxation,
    RouterActivation,
    RouterArchitecture,
    RouterType,
    SeamWeight,
    Sharing,
    UpdateRule,
)
from mor.config.depth import Depth

# None, and never None once the configuration is made: the default follows from other fields.
_DERIVED: Any = None


@dataclass(kw_only=True, repr=False, eq=False)
class Fields(Depth):
    """Everything that defines the network; see :class:`~mor.config.MoRConfig` for what each means.

    A field that is left out, or None, and is not optional gets its value from the others.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_attention_heads: int = 4
    num_key_value_heads: int = _DERIVED
    head_dim: int = _DERIVED
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] = _DERIVED
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    attention_out_bias: bool = _DERIVED
    mlp_bias: bool = False
    use_qk_norm: bool = False

    num_recursions: int = 1
    num_recursion_layers: int = _DERIVED
    num_prelude_layers: int = _DERIVED
    num_coda_layers: int = _DERIVED
    sharing: Sharing = "middle_cycle"
    share_norms: bool = True
    relaxation: Relaxation = "none"
    relaxation_rank: int = 16
    relaxation_alpha: float | None = None
    recursion_seam: RecursionSeam = "none"
    recursion_seam_weight: SeamWeight = "channel"
    recursion_seam_init: float = 1.0
    recursion_scalars: bool = False
    recursion_scale: RecursionScale = "none"
    recursion_streams: int = 1
    kv_sharing: KVSharing = "none"
    update_rule: UpdateRule = "gated"

    router: RouterType = "fixed"
    router_fixed_depth: int | None = None
    router_architecture: RouterArchitecture = "linear"
    router_activation: RouterActivation = _DERIVED
    router_alpha: float = _DERIVED
    router_gate_bias: float = 0.0
    router_init_bias: float | None = None
    router_temperature: float = 1.0
    router_capacities: list[float] = _DERIVED
    router_capacity_warmup_steps: int = 0
    router_objective: Objective = "aux_loss"
    router_aux_loss_coef: float = 0.001
    router_z_loss_coef: float = 0.0
    router_balancing: Balancing = "loss"
    router_balancing_loss_coef: float = 0.1
    router_bias_update_rate: float = 0.001
    router_balance_warmup_steps: int = 0
    router_decision_rule: DecisionRule = "boundary"
    router_boundary_momentum: float = 0.95

    exit_loss_weights: list[float] | None = None

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    add_bos_token: bool | None = None
    eos_token_id: int | list[int] | None = None


def field_names() -> list[str]:
    """What a configuration may be given by name, ``num_hidden_layers`` included."""
    return [*(field.name for field in fields(Fields)), "num_hidden_layers"]


def field_types() -> dict[str, Any]:
    """The type of each field by name, None included where it stands for a default.

    ``num_hidden_layers`` is not among them: it is another way to say ``num_recursion_layers``.
    """
    hints = get_type_hints(Fields)
    return {
        field.name: hints[field.name] | None if field.default is None else hints[field.name]
        for field in fields(Fields)
    }
