"""A model as it is served, for evaluation: what do weights of 8 bits cost in nats?"""

from __future__ import annotations

from mor.hf.modeling import MoRForCausalLM
from mor.model.packed import Quantization, copy_around, serving_view


def serving_copy(model: MoRForCausalLM, quantization: Quantization | None = None) -> MoRForCausalLM:
    """``model`` over the weights that the engine serves it with; its parameters are shared.

    Args:
        model: in evaluation mode; it is not changed.
        quantization: as of :func:`mor.model.packed.serving_view`.

    Raises:
        MorError: the quantization cannot run here.
    """
    return copy_around(model, model=serving_view(model.model, quantization))
