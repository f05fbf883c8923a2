"""The fields of a configuration: names, types, defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from mor.config.choices import (
    Balancing,
    DecisionRule,
    HeadType,
    KVSharing,
    Modality,
    Objective,
    Pooling,
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
from mor.config.media import Media

# None, and never None once the configuration is made: the default follows from other fields.
_DERIVED: Any = None


@dataclass(kw_only=True, repr=False, eq=False)
class Fields(Depth, Media):
    """Everything that defines the network; a None that is not optional follows from other fields.

    What is MoR's own is explained at :class:`~mor.config.MoRConfig`, the rest here.

    Attributes:
        vocab_size: tokens that the embedding knows.
        hidden_size: D, width of the residual stream.
        intermediate_size: width of the feed-forward.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values; default as many as of queries.
        head_dim: width of a head; default ``hidden_size // num_attention_heads``.
        max_position_embeddings: longest sequence, in tokens.
        rms_norm_eps: added to the mean square in RMSNorm.
        rope_parameters: type, base and scaling of rotary positions, as Transformers has them.
        initializer_range: standard deviation of weights at the start.
        tie_word_embeddings: whether the head is the embedding.
        attention_out_bias: bias of the output projection of attention; default ``attention_bias``.
        router_fixed_depth: recursions of every token under ``fixed``; default R.
        router_architecture: ``linear``, one matrix; ``mlp`` and ``wide_mlp``, two layers.
        router_activation: what makes a gate of a logit; default ``softmax`` for ``token_choice``,
            ``sigmoid`` otherwise.
        router_alpha: factor of the gate; default 0.1 for ``expert_choice`` and ``random``, else 1.
        router_temperature: what the router's input is divided by.
        router_capacity_warmup_steps: optimiser steps in which capacities fall from 1.
        router_objective: what teaches ``expert_choice`` to decide alone: a loss on its logits, a
            second router on the detached stream (``aux_router``), or nothing.
        router_aux_loss_coef: weight of that loss.
        router_z_loss_coef: weight of the mean square of the logits.
        router_balancing: what spreads ``token_choice`` over depths: a loss, or a bias that follows
            the load (``loss_free``), or nothing.
        router_balancing_loss_coef: weight of the balancing loss.
        router_bias_update_rate: step of that bias.
        router_balance_warmup_steps: optimiser steps in which all tokens choose the last depth.
        router_decision_rule: what ``decide`` compares with: the stored ``boundary``, or the paper's
            0.5 (``half``).
        router_boundary_momentum: of the boundary's running mean over optimiser steps.
        use_cache: whether ``generate`` keeps keys and values.
        num_channels: colours of a pixel; 1 is grey.
        pad_token_id: token that fills short rows of a batch.
        eos_token_id: token, or tokens, that end a text.
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

    modality: Modality = "text"
    head_type: HeadType = _DERIVED
    is_causal: bool = _DERIVED
    image_size: int | list[int] | None = None
    patch_size: int | list[int] | None = None
    num_channels: int = 3
    stem_channels: list[int] | None = None
    stem_strides: list[int] | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    num_mel_bins: int | None = None
    conv_kernel: list[int] = _DERIVED
    conv_stride: list[int] = _DERIVED
    classifier_pooling: Pooling = "mean"

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
