"""What one device needs of memory to train: counted from the shapes, before anything is built.

An upper estimate: everything is taken to be there at once, though gradients fill while activations
empty. Activations are what autograd keeps of :class:`mor.model.layers.DecoderLayer` as it is
written; tokens that run a depth are those planned. Not counted: the queries that a GPU lays at
their places in full rows under KV sharing, the process itself, the scratch space of kernels, what
several ranks exchange. ``tests/train/test_estimate.py`` holds it against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mor.config import MoRConfig
from mor.model.flops import active_fractions, count_parameters
from mor.ops.cross_entropy import chunk_rows

FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: parameters in float32, and their bfloat16 copies under autocast.
        gradients: of all parameters, float32.
        optimiser: AdamW's two means, float32.
        activations: kept for the backward pass of one micro-batch, by stage.
        loss: logits and what the cross-entropy makes of them.
        teacher: its weights, and the streams that it keeps for the student.
    """

    weights: float
    gradients: float
    optimiser: float
    loss: float
    activations: dict[str, float] = field(default_factory=dict)
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """All of it at once."""
        fixed = self.weights + self.gradients + self.optimiser + self.teacher
        return fixed + self.loss + sum(self.activations.values())


def estimate_memory(
    config: MoRConfig,
    batch_size: int,
    seq_len: int,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    device_type: str = "cpu",
    trained: int | None = None,
    teacher: float = 0.0,
) -> Memory:
    """Memory to train ``config`` on micro-batches [batch_size, seq_len].

    Args:
        config: the model.
        batch_size, seq_len: of one device and micro-batch.
        dtype: ``float32``, or ``bfloat16`` for autocast over float32 weights.
        gradient_checkpointing: layers keep their input alone and run again.
        device_type: how many tokens get logits at a time depends on it.
        trained: parameters that are not frozen; None for all.
        teacher: bytes, see :func:`mor.train.uptrain.costs.uptrain_costs`.
    """
    half = dtype == "bfloat16"
    parameters = count_parameters(config)[0]
    moving = parameters if trained is None else trained
    tokens = batch_size * seq_len
    return Memory(
        weights=parameters * (FLOAT + (HALF if half else 0)),
        gradients=moving * FLOAT,
        optimiser=2 * moving * FLOAT,
        loss=loss_bytes(config, tokens, chunk_rows(config.vocab_size, device_type)),
        activations=_activations(config, tokens, half, gradient_checkpointing),
        teacher=teacher,
    )


def loss_bytes(config: MoRConfig, tokens: int, chunk_tokens: int | None = None) -> float:
    """Logits, their log-softmax and its gradient: three of [tokens, V]; the head's gradient.

    Args:
        config: for V.
        tokens: of a micro-batch.
        chunk_tokens: how many get logits at a time; None where all do.
    """
    at_once = tokens if chunk_tokens is None else min(tokens, chunk_tokens)
    return FLOAT * config.vocab_size * (3.0 * at_once + config.hidden_size)


def layer_bytes(config: MoRConfig, half: bool) -> float:
    """What autograd keeps of one layer per token that runs it.

    Args:
        config: the widths.
        half: under autocast to bfloat16. Norms and the stream stay in float32 then, and every
            linear layer keeps a bfloat16 copy of its input.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    # A norm keeps its input and the normalised stream; its output is what q, k, v (gate, up) keep.
    norms = 2 * 2 * FLOAT * width
    inputs = (3 + 2) * HALF * width if half else 2 * FLOAT * width
    one = HALF if half else FLOAT
    # q, k, v, the output, and its log-sum-exp.
    keys = config.num_key_value_heads * config.head_dim
    attention = one * (2 * queries + 2 * keys) + FLOAT * config.num_attention_heads
    # gate, silu(gate), up, and their product.
    return norms + inputs + attention + 4 * one * ffn


def _activations(config: MoRConfig, tokens: int, half: bool, again: bool) -> dict[str, float]:
    """Bytes by stage. Where layers run ``again``, they keep their input, and one its all."""
    stream = FLOAT * config.hidden_size
    layer = layer_bytes(config, half)
    kept = stream if again else layer
    found = {"prelude": config.num_prelude_layers * tokens * kept}
    shares = active_fractions(config)
    before = 1.0
    for depth, share in enumerate(shares):
        if not share:
            continue
        one = stream if again else layer
        # The block's output for the update, and the stream that the router scored.
        update = share * stream if config.is_routed else 0.0
        scored = before * stream if config.router in ("expert_choice", "threshold") else 0.0
        rope = share * 2 * FLOAT * config.head_dim if share < 1 else 0.0
        per_token = share * config.num_recursion_layers * one + update + scored + rope
        found[f"recursion {depth}"] = tokens * per_token
        before = share
    found["coda"] = config.num_coda_layers * tokens * kept
    found["final norm"] = tokens * 3 * stream
    if again:
        found["one layer again"] = tokens * layer
    return {name: size for name, size in found.items() if size}
