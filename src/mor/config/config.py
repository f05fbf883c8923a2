"""The configuration of a Mixture-of-Recursions model: widths, depth, sharing, routing, caching.

Widths carry Hugging Face's names. What the paper (arXiv 2507.10524) adds is depth: a stack of

    num_prelude_layers + num_recursions x num_recursion_layers + num_coda_layers

unrolled layers, of which only ``num_prelude_layers + num_recursion_layers + num_coda_layers`` have
weights of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from mor.config.choices import default_capacities
from mor.config.fields import Fields, field_names
from mor.config.names import refuse_near_misses, rope_of, take_extra
from mor.config.rules import check_config, check_types
from mor.errors import ConfigError

__all__ = ["MoRConfig"]

_DEFAULT_BLOCK = 4


class MoRConfig(Fields, PretrainedConfig):
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

    Between recursions (see ``mor.model.seam``; all of it is off by default):
        recursion_seam: ``norm_inject``: what enters each recursion but the first is rms_norm(h) +
            a e, with e the stream before the recursions (arXiv 2609.19107).
        recursion_seam_weight, recursion_seam_init: a is learned per ``channel`` or as one number
            (``scalar``), and starts at this value.
        recursion_scalars: a learned factor per depth of what a recursion contributes.
        recursion_scale: ``inverse`` multiplies what a recursion contributes by 1 / R.
        recursion_streams: how many streams are carried between recursions and mixed after each
            (hyper-connections between loops, arXiv 2604.21254).

        exit_loss_weights: R - 1 weights of the training loss at the exits before the last: the
            stream after 1, 2 ... recursions goes through coda and head too, and its cross-entropy
            is added with this weight. None: the loss is taken at the end alone.

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
            paper, ``additive`` h + block(h), ``residual`` h + g (block(h) - h), ``last`` block(h)
            as in a plain recursive model. Under ``last`` the gate has a gradient (straight
            through) and no effect; the router reads the stream and sends no gradient into it.
        router_gate_bias: added to the logit inside the gate, not to what a boundary is compared
            with. With ``router_alpha`` 1 / sigmoid(bias) a logit of 0 is a gate of 1.

        router_init_bias: a bias per depth of the logit that says "go on", learned, which starts at
            this value: 3 lets nearly all tokens run every depth at first. Token choice has it on
            the deepest choice. None: logits have no bias.

    Caching (paper section 2.3):
        kv_sharing: ``none`` (recursion-wise caching: keys and values per depth, active tokens
            only), ``recursive`` (every depth reads depth 0), ``recursive_update`` (the same, with
            the active tokens' entries refreshed at each depth), ``propagate`` (every depth sees
            every token: one that left is there with keys and values of its final state, as in
            CALM's state propagation, arXiv 2207.07061).

    Images and sounds (see ``mor.model.front``):
        modality: what tokens are made of: ``text`` (ids), ``image`` (patches of pixels) or
            ``audio`` (frames of log-mel or other coefficients).
        head_type: ``vocabulary`` (text), ``classes`` (``num_labels`` of them, from the tokens
            pooled; the default of images and sounds) or ``regression`` of the next patch or frame.
        is_causal: whether a token sees earlier ones alone. The default, but for classes of images
            and sounds: there every token sees all others, as in an encoder.
        image_size, patch_size: in pixels, one number or [height, width].
        stem_channels, stem_strides: convolutions of 3 x 3 before the map of patches, in order:
            channels of each, and strides of 1 to 3 whose product is ``patch_size``. None: none.
            Patches of a picture then see their neighbours, so it is not for ``is_causal`` patches.
        image_token_id: in a model of text that reads images (``MoRForConditionalGeneration``): the
            token that stands at the place of each patch.
        audio_token_id: the same of a model of text that hears sounds; it needs ``num_mel_bins``.
        num_mel_bins: numbers per frame: mel bins, or coefficients of another kind.
        conv_kernel, conv_stride: of the convolutions over frames, in order; default [3], [2].
        classifier_pooling: classes are read off the ``mean`` of all tokens, or the ``last`` one.

    Raises:
        ConfigError: naming the field, its value and what would be right. A name that is no field,
            in the call or in a ``config.json``, is refused; PretrainedConfig's own are its own.
    """

    model_type = "mor"
    # All else that the model returns goes to `compute_metrics`: logits, and hidden states if any.
    keys_to_ignore_at_inference = [  # noqa: RUF012
        *(
            "cache",
            "past_key_values",
            "lm_loss",
            "router_losses",
            "exit_losses",
            "depths",
            "traces",
        ),
        *("label_loss", "token_mask"),
    ]

    def __post_init__(self, **kwargs: Any) -> None:
        """Work out the fields that are None, check all of them, then let Transformers do its part.

        Args:
            kwargs: what is no field: ``num_hidden_layers``, ``rope_theta``, ``rope_scaling``, and
                what Transformers' own configurations take.

        Raises:
            ConfigError: naming the first wrong field.
        """
        unrolled = kwargs.pop("num_hidden_layers", None)
        theta, scaling = kwargs.pop("rope_theta", 10000.0), kwargs.pop("rope_scaling", None)
        self.rope_parameters = rope_of(self.rope_parameters, scaling, theta)
        kwargs = take_extra(type(self), kwargs)
        self.hidden_act = "silu"
        # Libraries read it off every configuration of a class that is not Transformers' own.
        self.auto_map: dict[str, str] = {}
        check_types(self, unrolled)
        self._fill_in(unrolled)
        # Before Transformers looks: our messages say what would be right.
        self.check()
        try:
            super().__post_init__(**kwargs)
            self.validate()
        except KeyError as error:  # its check of rope_parameters
            raise ConfigError(str(error.args[0])) from None

    def _fill_in(self, unrolled: int | None) -> None:
        """Give every field that is None, and may not stay so, the value that follows from others.

        Args:
            unrolled: ``num_hidden_layers``, where it was given.
        """

        def derive(**defaults: Any) -> None:
            for name, value in defaults.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)

        text = self.modality == "text"
        derive(head_type="vocabulary" if text else "classes", conv_kernel=[3], conv_stride=[2])
        derive(is_causal=text or self.head_type != "classes")
        if self.head_type != "vocabulary":
            self.tie_word_embeddings = False  # there is no vocabulary to tie
        private = int(str(self.sharing).startswith("middle_"))
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // max(1, self.num_attention_heads)
        derive(
            attention_out_bias=self.attention_bias,
            num_prelude_layers=private,
            num_coda_layers=private,
            router_activation="softmax" if self.router == "token_choice" else "sigmoid",
            # The published recipes: 0.1 for expert choice, 1.0 for token choice.
            router_alpha=0.1 if self.router in ("expert_choice", "random") else 1.0,
        )
        self.num_recursion_layers = self._block_size(unrolled, self.num_recursion_layers)
        given: list[float] | None = self.router_capacities
        capacities = default_capacities(self.num_recursions) if given is None else given
        # Anything but a list is left for check() to refuse.
        if isinstance(capacities, (list, tuple)):
            capacities = [float(c) if isinstance(c, int) else c for c in capacities]
        self.router_capacities = capacities

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a ``config.json``; fields among ``kwargs`` replace its own.

        They go through the constructor: what hangs on them follows, and all is checked.

        Raises:
            ConfigError: a wrong or misspelt field.
        """
        own = {name: kwargs.pop(name) for name in field_names() if name in kwargs}
        refuse_near_misses(cls, kwargs)
        return super().from_dict({**config_dict, **own}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As Transformers'; an ``auto_map`` that names nothing is left out."""
        found: dict[str, Any] = super().to_dict()
        if not found.get("auto_map"):
            found.pop("auto_map", None)
        return found

    @property
    def output_router_logits(self) -> bool:
        """Not there, whoever asks: TRL sets it on any configuration with ``router_aux_loss_coef``.

        It would then take the model for a mixture of experts and add the balancing loss of those.
        """
        raise AttributeError("output_router_logits")

    @output_router_logits.setter
    def output_router_logits(self, value: bool) -> None:
        pass

    @property
    def class_names(self) -> list[str]:
        """What the numbers of a head over classes stand for."""
        names: Any = self.id2label
        return [str(names[number]) for number in range(self.num_labels or 0)]

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

    def check(self) -> None:
        """Validate every field. Called by the constructor.

        Raises:
            ConfigError: naming the first wrong field.
        """
        check_config(self)
