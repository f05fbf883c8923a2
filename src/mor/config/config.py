"""The configuration of a Mixture-of-Recursions model: widths, depth, sharing, routing, caching.

Widths carry Hugging Face's names. What the paper (arXiv 2507.10524) adds is depth: a stack of

    num_prelude_layers + num_recursions x num_recursion_layers + num_coda_layers

unrolled layers, of which only ``num_prelude_layers + num_recursion_layers + num_coda_layers`` have
weights of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mor.config.choices import (
    Balancing,
    DecisionRule,
    KVSharing,
    Objective,
    Relaxation,
    RouterActivation,
    RouterArchitecture,
    RouterType,
    Sharing,
    UpdateRule,
    default_capacities,
)
from mor.config.rules import ROPE_TYPES, ConfigError, check_config

__all__ = ["ROPE_TYPES", "ConfigError", "MoRConfig"]

_DEFAULT_BLOCK = 4


class MoRConfig(PretrainedConfig):
    """Everything that defines the network. ``MoRConfig()`` is a small vanilla model.

    Llama's relatives:
        attention_bias: biases of the query, key and value projections, and of the output
            projection too unless ``attention_out_bias`` says otherwise.
        mlp_bias: biases of the feed-forward.
        use_qk_norm: RMSNorm of each head's query and key before they are rotated (Qwen3).

    Depth and sharing (paper section 2.1):
        num_recursions: R, how often the shared block may be applied. 1 is a vanilla model.
        num_recursion_layers: K, layers in the shared block (default 4).
        num_hidden_layers: the unrolled depth, as another way to say K.
        num_prelude_layers, num_coda_layers: private layers before and after; default 1 for the
            ``middle_*`` rules and 0 otherwise.
        sharing: ``cycle`` / ``middle_cycle`` apply the block R times in a row; ``sequence`` /
            ``middle_sequence`` repeat each of its layers R times in a row.
        share_norms: one set of norm weights per shared layer, or one per unrolled layer.
        relaxation: what else differs between uses of a shared layer (arXiv 2410.20672): ``none``,
            ``lora`` (every linear map, ``relaxation_rank``), ``gains`` (per channel, on what
            attention and feed-forward add), ``embeddings`` (a vector per depth).
        relaxation_rank: rank of ``lora``; a map that has less takes what it has.
        relaxation_alpha: scale of ``lora`` times the rank; default the rank, so that it is 1.

    Texts (see ``mor.data.bos``):
        bos_token_id: the tokenizer's token that begins a text, used or not.
        add_bos_token: whether every text begins with it, in training as in prompts; None where
            that was not written down: then as the tokenizer beside the model does.

    Routing (paper section 2.2; every field starts with ``router``, see ``mor.model.routers``):
        router: ``fixed`` (every token runs ``router_fixed_depth`` recursions, default R),
            ``expert_choice``, ``token_choice``, ``threshold`` or ``random``.
        router_capacities: fraction of all tokens active at each depth, non-increasing; default
            (R - depth) / R.
        update_rule: how a recursion's output enters the stream: ``gated`` h + g block(h) as in the
            paper, ``additive`` h + block(h), ``residual`` h + g (block(h) - h).
        router_gate_bias: added to the logit inside the gate, not to what a boundary is compared
            with. With ``router_alpha`` 1 / sigmoid(bias) a logit of 0 is a gate of 1.

    Caching (paper section 2.3):
        kv_sharing: ``none`` (recursion-wise caching: keys and values per depth, active tokens
            only), ``recursive`` (every depth reads depth 0), ``recursive_update`` (the same, with
            the active tokens' entries refreshed at each depth).

    Raises:
        ConfigError: naming the field, its value and what would be right.
    """

    model_type = "mor"
    keys_to_ignore_at_inference = ["past_key_values", "router_losses", "router_metrics"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        attention_bias: bool = False,
        attention_out_bias: bool | None = None,
        mlp_bias: bool = False,
        use_qk_norm: bool = False,
        num_recursions: int = 1,
        num_recursion_layers: int | None = None,
        num_prelude_layers: int | None = None,
        num_coda_layers: int | None = None,
        num_hidden_layers: int | None = None,
        sharing: Sharing = "middle_cycle",
        share_norms: bool = True,
        relaxation: Relaxation = "none",
        relaxation_rank: int = 16,
        relaxation_alpha: float | None = None,
        kv_sharing: KVSharing = "none",
        update_rule: UpdateRule = "gated",
        router: RouterType = "fixed",
        router_fixed_depth: int | None = None,
        router_architecture: RouterArchitecture = "linear",
        router_activation: RouterActivation | None = None,
        router_alpha: float | None = None,
        router_gate_bias: float = 0.0,
        router_temperature: float = 1.0,
        router_capacities: list[float] | None = None,
        router_capacity_warmup_steps: int = 0,
        router_objective: Objective = "aux_loss",
        router_aux_loss_coef: float = 0.001,
        router_z_loss_coef: float = 0.0,
        router_balancing: Balancing = "loss",
        router_balancing_loss_coef: float = 0.1,
        router_bias_update_rate: float = 0.001,
        router_balance_warmup_steps: int = 0,
        router_decision_rule: DecisionRule = "boundary",
        router_boundary_momentum: float = 0.95,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        add_bos_token: bool | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        middle = str(sharing).startswith("middle_")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // max(1, num_attention_heads)
        self.hidden_act = "silu"
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        theta = kwargs.pop("rope_theta", 10000.0)
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": theta}
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.attention_out_bias = (
            attention_bias if attention_out_bias is None else attention_out_bias
        )
        self.mlp_bias = mlp_bias
        self.use_qk_norm = use_qk_norm
        self.num_recursions = num_recursions
        self.num_prelude_layers = int(middle) if num_prelude_layers is None else num_prelude_layers
        self.num_coda_layers = int(middle) if num_coda_layers is None else num_coda_layers
        self.num_recursion_layers = self._block_size(num_hidden_layers, num_recursion_layers)
        self.sharing = sharing
        self.share_norms = share_norms
        self.relaxation = relaxation
        self.relaxation_rank = relaxation_rank
        self.relaxation_alpha = relaxation_alpha
        self.kv_sharing = kv_sharing
        self.update_rule = update_rule
        self.router = router
        self.router_fixed_depth = router_fixed_depth
        self.router_architecture = router_architecture
        softmax = router == "token_choice"
        self.router_activation = router_activation or ("softmax" if softmax else "sigmoid")
        # The published recipes: 0.1 for expert choice, 1.0 for token choice.
        paper_alpha = 0.1 if router in ("expert_choice", "random") else 1.0
        self.router_alpha = paper_alpha if router_alpha is None else router_alpha
        self.router_gate_bias = router_gate_bias
        self.router_temperature = router_temperature
        self.router_capacities = (
            default_capacities(num_recursions)
            if router_capacities is None
            else [float(c) for c in router_capacities]
        )
        self.router_capacity_warmup_steps = router_capacity_warmup_steps
        self.router_objective = router_objective
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.router_balancing = router_balancing
        self.router_balancing_loss_coef = router_balancing_loss_coef
        self.router_bias_update_rate = router_bias_update_rate
        self.router_balance_warmup_steps = router_balance_warmup_steps
        self.router_decision_rule = router_decision_rule
        self.router_boundary_momentum = router_boundary_momentum
        self.use_cache = use_cache
        kwargs.pop("hidden_act", None)
        self.pad_token_id, self.bos_token_id = pad_token_id, bos_token_id
        self.add_bos_token = add_bos_token
        # Before Transformers looks: our messages say what would be right.
        self.check()
        try:
            super().__init__(  # type: ignore[call-arg]
                pad_token_id=pad_token_id,
                bos_token_id=bos_token_id,
                eos_token_id=eos_token_id,
                tie_word_embeddings=tie_word_embeddings,
                **kwargs,
            )
        except KeyError as error:  # its check of rope_parameters
            raise ConfigError(str(error.args[0])) from None

    @property
    def output_router_logits(self) -> bool:
        """Not there, whoever asks: TRL sets it on any configuration with ``router_aux_loss_coef``.

        It would then take the model for a mixture of experts and add the balancing loss of those.
        """
        raise AttributeError("output_router_logits")

    @output_router_logits.setter
    def output_router_logits(self, value: bool) -> None:
        pass

    def _block_size(self, unrolled: int | None, block: int | None) -> int:
        """K from ``num_recursion_layers``, or from the unrolled depth ``num_hidden_layers``."""
        if unrolled is None:
            return _DEFAULT_BLOCK if block is None else block
        private, recursions = self.num_prelude_layers + self.num_coda_layers, self.num_recursions
        shared = unrolled - private
        if recursions < 1 or shared < recursions or shared % recursions:
            fewer = private + max(1, shared // max(1, recursions)) * recursions
            raise ConfigError(
                f"num_hidden_layers={unrolled} leaves {shared} layers to share after {private} "
                f"private ones, which num_recursions={recursions} does not divide; use {fewer} or "
                f"{fewer + recursions}"
            )
        if block is not None and block * recursions != shared:
            raise ConfigError(
                f"num_hidden_layers={unrolled} and num_recursion_layers={block} contradict each "
                f"other at num_recursions={recursions}; leave one of them out"
            )
        return shared // recursions

    @property
    def num_hidden_layers(self) -> int:
        """Unrolled depth: prelude + R x block + coda."""
        recursion = self.num_recursions * self.num_recursion_layers
        return self.num_prelude_layers + recursion + self.num_coda_layers

    @property
    def is_routed(self) -> bool:
        """Whether tokens may differ in depth, so that rows have to be compacted."""
        return self.router != "fixed"

    @property
    def family(self) -> str:
        """``vanilla``, ``recursive`` or ``mor``: the paper's three families."""
        if self.is_routed:
            return "mor"
        return "vanilla" if self.num_recursions == 1 else "recursive"

    @property
    def interleaved(self) -> bool:
        """Whether each shared layer is repeated in a row (``sequence``) rather than the block."""
        return self.sharing.endswith("sequence")

    def shared_layer(self, unrolled: int) -> int:
        """Index of the shared layer that unrolled recursion layer ``unrolled`` (0-based) uses."""
        if self.interleaved:
            return unrolled // self.num_recursions
        return unrolled % self.num_recursion_layers

    def repetition(self, unrolled: int) -> int:
        """How often that shared layer has been used before (0 for its first use)."""
        if self.interleaved:
            return unrolled % self.num_recursions
        return unrolled // self.num_recursion_layers

    def check(self) -> None:
        """Validate every field. Called by the constructor.

        Raises:
            ConfigError: naming the first wrong field.
        """
        check_config(self)
