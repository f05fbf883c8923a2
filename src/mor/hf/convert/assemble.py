"""From somebody's tensors to ours: which of their names feed which of our parameters.

A plan says for every parameter of ours, or for one entry of its first axis, under which names the
same tensor stands in the source. Shared layers have several names; they must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.folder.weights import ConversionError
from mor.hf.modeling import MoRForCausalLM
from mor.model.relaxation import LINEAR_MAPS
from mor.model.routers import BoundaryRouter


def layer_tensors(config: MoRConfig) -> list[str]:
    """Names of a layer's tensors within it, the same as Transformers'."""
    biased = {
        "self_attn": dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias)
        | {"o_proj": config.attention_out_bias},
        "mlp": dict.fromkeys(LINEAR_MAPS["mlp"], config.mlp_bias),
    }
    names = [f"{half}.{name}.weight" for half, maps in LINEAR_MAPS.items() for name in maps]
    names += [f"{half}.{n}.bias" for half, maps in biased.items() for n, has in maps.items() if has]
    if config.use_qk_norm:
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    return [*names, "input_layernorm.weight", "post_attention_layernorm.weight"]


Target = tuple[str, int | None]
"""A parameter of ours, and an index into its first axis where it is a stack of theirs."""
Plan = dict[Target, list[str]]


def trunk_plan(
    config: MoRConfig, block: Callable[[int], str], prelude: str, coda: Callable[[int], str]
) -> Plan:
    """The plan of everything but the router.

    Args:
        config: ours.
        block: their prefix of unrolled recursion layer i, 0 <= i < R K.
        prelude: their prefix of prelude layers, to which the index is added.
        coda: their prefix of coda layer i.
    """
    plan: Plan = {
        ("model.embed_tokens.weight", None): ["model.embed_tokens.weight"],
        ("model.norm.weight", None): ["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        plan["model.lm_head.weight", None] = ["lm_head.weight"]
    for tensor in layer_tensors(config):
        apart = tensor.endswith("norm.weight") and not config.share_norms
        for i in range(config.num_prelude_layers):
            plan[f"model.prelude_layers.{i}.{tensor}", None] = [f"{prelude}{i}.{tensor}"]
        for i in range(config.num_recursions * config.num_recursion_layers):
            name = f"model.block.{config.shared_layer(i)}.{tensor}"
            index = config.repetition(i) if apart else None
            plan.setdefault((name, index), []).append(f"{block(i)}.{tensor}")
        for i in range(config.num_coda_layers):
            plan[f"model.coda_layers.{i}.{tensor}", None] = [f"{coda(i)}.{tensor}"]
    return plan


def stack_plan(config: MoRConfig) -> Plan:
    """The plan of a source that numbers all unrolled layers ``model.layers.0`` to ``L - 1``."""
    first = config.num_prelude_layers
    last = first + config.num_recursions * config.num_recursion_layers
    return trunk_plan(
        config,
        block=lambda i: f"model.layers.{first + i}",
        prelude="model.layers.",
        coda=lambda i: f"model.layers.{last + i}",
    )


def assemble(
    config: MoRConfig, plan: Plan, weights: dict[str, Tensor], source: Path
) -> MoRForCausalLM:
    """Our model with the tensors of ``weights``, in their dtype (routers in float32).

    Stored constants that the source does not have keep their start: no bias, the 0.5 rule.

    Raises:
        ConversionError: a tensor is missing, has another shape than the configuration says, differs
            from one it must equal, or is not known to the plan.
    """
    _check_known(plan, weights, source)
    with torch.device("meta"):
        model = MoRForCausalLM(config)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for (ours, index), names in plan.items():
        if ours == "model.embed_tokens.weight" and config.tie_word_embeddings:
            names = [*names, *({"lm_head.weight"} & weights.keys())]
        shape = shapes[ours] if index is None else shapes[ours][1:]
        tensor = _agreed(names, shape, weights, source)
        if ours.startswith("model.router."):
            tensor = tensor.float()
        if index is None:
            state[ours] = tensor
        else:
            stacks.setdefault(ours, []).append(tensor)
    state |= {ours: torch.stack(parts) for ours, parts in stacks.items()}
    for name in ("model.router.boundary", "model.router.boundary_steps", "model.router.bias"):
        if name in shapes and name not in state:
            state[name] = torch.zeros(shapes[name])
    router = model.model.router
    if isinstance(router, BoundaryRouter) and ("model.router.boundary", None) not in plan:
        state["model.router.boundary"] += router.half_rule
    if config.tie_word_embeddings:
        state["model.lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _check_known(plan: Plan, weights: dict[str, Tensor], source: Path) -> None:
    """Refuse tensors of a network that the plan does not know."""
    known = {name for names in plan.values() for name in names} | {"lm_head.weight"}
    # Other names (optimizer state, recorded activations) are not the network's.
    network = ("model.", "lm_head.", "base_model.")
    strange = [
        name
        for name in weights
        if name.startswith(network)
        and name not in known
        and not name.endswith("rotary_emb.inv_freq")
    ]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ConversionError(
            f"{source}: holds {strange[0]}{more}, which the configured model does not have; check "
            "num_hidden_layers and the routing fields, and merge or remove LoRA, prompts and "
            "recursion encodings first"
        )


def _agreed(
    names: list[str], shape: torch.Size, weights: dict[str, Tensor], source: Path
) -> Tensor:
    """The one tensor that stands under all ``names``."""
    for name in names:
        if name not in weights:
            raise ConversionError(f"{source}: {name} is missing")
        if weights[name].shape != shape:
            raise ConversionError(
                f"{source}: {name} has shape {list(weights[name].shape)}; "
                f"the configuration says {list(shape)}"
            )
        if not weights[name].is_floating_point():
            raise ConversionError(
                f"{source}: {name} has dtype {weights[name].dtype}; expected floating point, "
                "so undo any quantisation first"
            )
    first = weights[names[0]]
    for name in names[1:]:
        if not torch.equal(first, weights[name]):
            raise ConversionError(_disagreement(names[0], name, source))
    if first.is_contiguous() and first.untyped_storage().nbytes() == first.nbytes:
        return first
    # A slice of a larger storage would carry all of it into the file.
    return first.clone(memory_format=torch.contiguous_format)


def _disagreement(first: str, second: str, source: Path) -> str:
    said = f"{source}: {first} and {second} are one shared tensor but differ"
    if ".self_attn." in first and ".block." in first:
        said += (
            "; the authors' first release untied attention between recursions by mistake (their "
            "issue 17, fixed in their commit 82c97f2); such a checkpoint shares no attention"
        )
    elif "layernorm" in first:
        said += "; set recursive.ln_share to false if norms are meant to be apart"
    return said
