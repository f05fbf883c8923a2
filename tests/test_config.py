"""Every wrong field is named, with its value."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from mor import ConfigError, MoRConfig, preset
from mor.config import field_types

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 64.5}, "hidden_size=64.5"),
    ({"num_recursions": True}, "num_recursions=True"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"head_dim": 15}, "head_dim=15"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ({"initializer_range": float("nan")}, "initializer_range=nan"),
    ({"router_temperature": 0}, "router_temperature=0"),
    ({"router_z_loss_coef": -1.0}, "router_z_loss_coef=-1.0"),
    ({"pad_token_id": 4096}, "pad_token_id=4096"),
    ({"sharing": "circle"}, "sharing='circle'"),
    ({"sharing": "cycle", "num_prelude_layers": 1}, "middle_cycle"),
    ({"num_recursions": 2, "router": "threshold", "sharing": "sequence"}, "sharing='sequence'"),
    ({"sharing": "middle_sequence", "kv_sharing": "recursive_update"}, "recursive_update"),
    ({"router": "threshold"}, "num_recursions"),
    ({"num_recursions": 2, "router_capacities": [1.0]}, "2 needs one for each depth"),
    ({"num_recursions": 2, "router_capacities": [0.5, 0.6]}, "rises with depth"),
    ({"num_recursions": 2, "router_capacities": [1.0, 0.0]}, r"\(0, 1\]"),
    ({"num_recursions": 2, "router_fixed_depth": 3}, "router_fixed_depth=3"),
    ({"num_recursions": 2, "router": "threshold", "router_activation": "softmax"}, "softmax"),
    ({"num_recursions": 2, "router": "token_choice", "router_activation": "tanh"}, "tanh"),
    ({"router_boundary_momentum": 1.0}, "router_boundary_momentum=1.0"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
    ({"num_hidden_layers": 32, "num_recursions": 4}, "use 30 or 34"),
    ({"num_hidden_layers": 8, "num_recursion_layers": 3, "num_recursions": 3}, "contradict"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG, ids=lambda value: str(value)[:50])
def test_wrong_fields_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MoRConfig(**fields)


def test_configuration_survives_its_own_file(tmp_path: Any) -> None:
    config = preset("360m", "mor", 4, router="threshold", kv_sharing="recursive_update")
    config.save_pretrained(tmp_path)
    assert MoRConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_configurations_are_equal_when_all_their_fields_are() -> None:
    assert MoRConfig(hidden_size=64) == MoRConfig(hidden_size=64, head_dim=16)
    assert MoRConfig(hidden_size=64) != MoRConfig(hidden_size=128)
    assert MoRConfig(num_recursions=2) != MoRConfig(num_recursions=2, router="threshold")


def test_every_field_has_a_value_or_may_be_none() -> None:
    config, types = MoRConfig(num_recursions=2, router="threshold"), field_types()
    optional = {"relaxation_alpha", "router_fixed_depth", "pad_token_id", "bos_token_id"}
    optional |= {"eos_token_id"}
    assert {name for name in types if getattr(config, name) is None} == optional
    given = {name: getattr(config, name) for name in types}
    assert MoRConfig(**given) == MoRConfig(**dict.fromkeys(types) | given) == config
    nones = {name: None for name, kind in types.items() if type(None) in get_args(kind)}
    assert MoRConfig(**nones) == MoRConfig()


def test_unrolled_depth_is_another_way_to_say_the_block() -> None:
    assert MoRConfig(num_hidden_layers=34, num_recursions=4).num_recursion_layers == 8
    assert preset("360m", num_recursions=3, num_hidden_layers=62).num_recursion_layers == 20
    # 32 layers do not divide by 4: the paper's R = 4 model has 34.
    assert preset("360m", num_recursions=4).num_hidden_layers == 34


def test_presets_refuse_what_they_do_not_know() -> None:
    for wrong in ({"name": "400m"}, {"name": "360m", "family": "moe"}):
        with pytest.raises(ConfigError, match="use one of"):
            preset(**wrong)
    with pytest.raises(ConfigError, match="must be 1"):
        preset("360m", "vanilla", num_recursions=2)
    with pytest.raises(ConfigError, match="at least 1"):
        preset("360m", num_recursions=0)
