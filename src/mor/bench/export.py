"""Our vanilla model as a Llama folder, which every peer can read."""

from __future__ import annotations

from copy import copy
from pathlib import Path

from transformers import LlamaForCausalLM

from mor.errors import MorError
from mor.hf.export.llama import as_llama
from mor.hf.modeling import MoRForCausalLM


def convert_to_llama(model: MoRForCausalLM) -> LlamaForCausalLM:
    """Transformers' Llama with the weights of a vanilla model.

    Raises:
        MorError: it is no vanilla model, or one that Llama does not describe.
    """
    config = model.config
    biases = config.attention_bias or config.mlp_bias or config.use_qk_norm
    if config.num_recursions != 1 or biases or config.relaxation != "none":
        raise MorError("only a vanilla model with Llama's layers can be given to the peers")
    made = as_llama(model)
    assert isinstance(made, LlamaForCausalLM)
    return made


def export_llama(model: MoRForCausalLM, folder: Path) -> Path:
    """Write :func:`convert_to_llama` of ``model`` to ``folder`` in Hugging Face's layout.

    Raises:
        MorError: see :func:`convert_to_llama`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    llama = convert_to_llama(model)
    # Ids in, ids out, and a fixed number of them: no default of the folder may end a text.
    settings = copy(llama.generation_config)
    settings.eos_token_id, settings.do_sample = None, False
    llama.generation_config = settings
    llama.save_pretrained(folder)
    return folder
