"""Our vanilla model as a Llama folder, which every peer can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from mor.errors import MorError
from mor.hf.modeling import MoRForCausalLM

COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias",
)  # fmt: skip


def convert_to_llama(model: MoRForCausalLM) -> LlamaForCausalLM:
    """Transformers' Llama with the weights (the same tensors) of a vanilla model.

    Raises:
        MorError: it is no vanilla model, or one that Llama does not describe.
    """
    config = model.config
    biases = config.attention_bias or config.mlp_bias or config.use_qk_norm
    if config.num_recursions != 1 or biases or config.relaxation != "none":
        raise MorError("only a vanilla model with Llama's layers can be given to the peers")
    fields = {name: getattr(config, name) for name in COPIED}
    llama_config = LlamaConfig(**fields, rope_parameters=dict(config.rope_parameters))
    core = model.model
    weights = {
        "model.embed_tokens.weight": core.embed_tokens.weight,
        "model.norm.weight": core.norm.weight,
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = core.lm_head.weight
    for number, layer in enumerate([*core.prelude_layers, *core.block, *core.coda_layers]):
        for name, tensor in layer.state_dict().items():
            weights[f"model.layers.{number}.{name}"] = tensor
    llama: Any = LlamaForCausalLM(llama_config)
    llama = llama.to(model.dtype).eval()
    missing, unknown = llama.load_state_dict(weights, strict=False)
    lost = [
        name
        for name in missing
        if not (name == "lm_head.weight" and llama.config.tie_word_embeddings)
    ]
    if lost or unknown:
        raise MorError(f"the weights do not line up with Llama's: {sorted([*lost, *unknown])[:3]}")
    llama.tie_weights()
    return llama


def export_llama(model: MoRForCausalLM, folder: Path) -> Path:
    """Write :func:`convert_to_llama` of ``model`` to ``folder`` in Hugging Face's layout.

    Raises:
        MorError: see :func:`convert_to_llama`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    llama = convert_to_llama(model)
    # Ids in, ids out, and a fixed number of them: no default of the folder may end a text.
    llama.generation_config.eos_token_id = None
    llama.generation_config.do_sample = False
    llama.save_pretrained(folder)
    return folder
