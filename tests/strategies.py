"""Small random models for property tests: every router, every way of caching, every sharing rule.

``configs`` draws valid configurations only. ``make_model`` builds one whose tokens really differ in
depth: wide router weights, norm weights that are not all ones, and boundaries that a few training
forwards have set.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor

from mor import MoRConfig, MoRForCausalLM
from mor.config.choices import KVSharing, Relaxation, RouterType, Sharing, UpdateRule
from mor.model.routers.base import Scores

ROUTERS: tuple[str, ...] = get_args(RouterType)
ROUTED = tuple(router for router in ROUTERS if router != "fixed")
KV_SHARING: tuple[str, ...] = get_args(KVSharing)
VOCAB = 61
SEEDS = st.integers(0, 2**20)


@st.composite
def configs(
    draw: st.DrawFn,
    routers: tuple[str, ...] = ROUTERS,
    kv_sharing: tuple[str, ...] = KV_SHARING,
    **fixed: Any,
) -> MoRConfig:
    """A valid small configuration; ``fixed`` fields are taken as they are."""
    router = draw(st.sampled_from(routers))
    kv = draw(st.sampled_from(kv_sharing))
    routed = router != "fixed"
    rules = [
        rule
        for rule in get_args(Sharing)
        if rule.endswith("cycle") or not (routed or kv in ("recursive_update", "propagate"))
    ]
    sharing = draw(st.sampled_from(rules))
    private = st.integers(0, 2) if sharing.startswith("middle") else st.just(0)
    recursions = draw(st.integers(2 if routed else 1, 3))
    heads, kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (2, 2)]))
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([None, 6])),
        "initializer_range": 0.25,
        "tie_word_embeddings": draw(st.booleans()),
        "num_recursions": recursions,
        "num_recursion_layers": draw(st.integers(1, 2)),
        "num_prelude_layers": draw(private),
        "num_coda_layers": draw(private),
        "sharing": sharing,
        "share_norms": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "relaxation": draw(st.sampled_from(get_args(Relaxation) if recursions > 1 else ["none"])),
        "relaxation_rank": 3,
        "kv_sharing": kv,
        "router": router,
        "pad_token_id": draw(st.sampled_from([None, 0])),
    }
    if recursions > 1 and sharing.endswith("cycle"):
        fields |= draw(seams())
    if not routed:
        # A cap in the middle of a layer-by-layer schedule has no meaning of its own.
        whole = sharing.endswith("sequence")
        depths = st.just(None) if whole else st.sampled_from([None, *range(1, recursions + 1)])
        fields["router_fixed_depth"] = draw(depths)
        note(f"MoRConfig(**{fields | fixed})")
        return MoRConfig(**fields | fixed)
    first = draw(st.sampled_from([1.0, 0.8]))
    chosen = [first * (recursions - r) / recursions for r in range(recursions)]
    fields |= {
        "update_rule": draw(st.sampled_from(get_args(UpdateRule))),
        "router_capacities": draw(st.sampled_from([None, chosen])),
        "router_architecture": draw(st.sampled_from(["linear", "mlp"])),
        "router_temperature": draw(st.sampled_from([1.0, 1.5])),
        "router_init_bias": draw(st.sampled_from([None, None, 1.0])),
        "router_alpha": draw(st.sampled_from([None, 0.7, 1.0])),
        "router_gate_bias": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "router_z_loss_coef": draw(st.sampled_from([0.0, 0.01])),
    }
    if router == "token_choice":
        fields |= {
            "router_activation": draw(st.sampled_from(["softmax", "sigmoid"])),
            "router_balancing": draw(st.sampled_from(["loss", "loss_free", "none"])),
            "router_bias_update_rate": 0.05,
        }
        if fields["router_activation"] == "softmax":
            fields["router_gate_bias"] = 0.0
    elif router in ("expert_choice", "threshold"):
        fields |= {
            "router_activation": draw(st.sampled_from(["sigmoid", "tanh", "none"])),
            "router_objective": draw(st.sampled_from(["aux_loss", "aux_router", "none"])),
            "router_decision_rule": draw(st.sampled_from(["boundary", "boundary", "half"])),
        }
    note(f"MoRConfig(**{fields | fixed})")
    return MoRConfig(**fields | fixed)


def seams() -> st.SearchStrategy[dict[str, Any]]:
    """Fields of what stands between recursions; nothing at all in half of the cases."""
    some = st.fixed_dictionaries(
        {
            "recursion_seam": st.sampled_from(["none", "norm_inject"]),
            "recursion_seam_weight": st.sampled_from(["channel", "scalar"]),
            "recursion_scalars": st.booleans(),
            "recursion_scale": st.sampled_from(["none", "inverse"]),
            "recursion_streams": st.sampled_from([1, 2, 3]),
        }
    )
    return st.just({}) | some


def small_config(router: str, kv_sharing: str = "none", **fields: Any) -> MoRConfig:
    """One plain configuration of a router and a KV mode, for tests that go through them all."""
    plain: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.25,
        "num_recursions": 3,
        "num_recursion_layers": 1,
        "router": router,
        "router_alpha": 0.7,
        "kv_sharing": kv_sharing,
    }
    return MoRConfig(**plain | fields)


def make_model(
    config: MoRConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> MoRForCausalLM:
    """A model in evaluation mode whose weights, routing and boundaries are nothing special.

    Random networks may magnify rounding errors; properties of all of them are tested in float64.
    """
    # A bare logit is the gate itself: near -1 it takes the stream away and leaves rounding errors.
    spread = 0.1 if config.router_activation == "none" else 0.5
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MoRForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".router." in name:
                    parameter.normal_(0.0, spread)
                elif ".seam." in name:  # off the values at which it has no effect
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "norm" in name or "_gain." in name:
                    parameter.normal_(1.0, 0.2)
                elif name.endswith("bias") or ".low_rank." in name or "depth_embedding" in name:
                    parameter.normal_(0.0, 0.2)
            model.to(dtype)
            model.train()
            for _ in range(3):
                model(torch.randint(config.vocab_size, (4, 12)))
                model.model.router.finish_step()
    return model.eval()


def train(model: MoRForCausalLM, ids: Tensor, **how: Any) -> Any:
    """One training forward with the ids themselves as labels."""
    return model.train()(ids, labels=ids, **how)


def scores_of(values: Tensor) -> Scores:
    """Scores that are these values in every respect, for routers without a model."""
    return Scores(values, values, values)


def random_ids(seed: int, *shape: int) -> Tensor:
    """Token ids of this shape, the same for the same seed."""
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def distinct_rows(seed: int, lengths: list[int]) -> list[Tensor]:
    """Rows of ids of which no two are the same in the whole batch, so that no scores tie."""
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))
    return list(order[: sum(lengths)].split(lengths))


def pad_rows(rows: list[Tensor], masks: list[list[bool]], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids laid on the True places of ``masks``; random ids everywhere else.

    Returns:
        ids [B, T] and attention mask [B, T].
    """
    mask = torch.tensor(masks)
    ids = random_ids(seed, *mask.shape)
    for row, own, ids_row in zip(rows, mask, ids, strict=True):
        ids_row[own] = row
    return ids, mask.long()


@st.composite
def padding_masks(draw: st.DrawFn, lengths: list[int]) -> list[list[bool]]:
    """A mask row for each length, all equally wide: padding left, right, or anywhere."""
    width = max(lengths) + draw(st.integers(0, 3))
    masks = []
    for length in lengths:
        places = [True] * length + [False] * (width - length)
        kind = draw(st.sampled_from(["left", "right", "holes"]))
        if kind == "left":
            places.reverse()
        elif kind == "holes":
            places = draw(st.permutations(places))
        masks.append(places)
    return masks
