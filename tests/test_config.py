"""Every wrong field is named, with its value."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from transformers import PretrainedConfig

from mor import ConfigError, MoRConfig, MoRForCausalLM, preset
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
    ({"num_recursion": 3}, "num_recursion is no field of MoRConfig; did you mean 'num_recursions'"),
    ({"kv_share": "recursive"}, "kv_share is no field of MoRConfig; did you mean 'kv_sharing'"),
    ({"wibble": 1}, "wibble is no field of MoRConfig; the fields are: vocab_size, .*upgrade mor"),
    ({"temperature": 0.5}, "temperature is no field of MoRConfig"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; use 'silu'"),
    ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
    ({"output_attentions": True}, "output_attentions=True is not supported"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
    ({"sliding_window": 128}, "sliding_window=128 is not supported"),
    ({"rope_parameters": {"factr": 2.0}}, r"rope_parameters\['factr'\]=2\.0 means nothing"),
    (
        {"rope_parameters": {"factor": 2.0}},
        r"\['factor'\]=2\.0 means nothing to rope_type='default'",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ({"rope_scaling": "linear"}, "must be a dictionary"),
    (
        {"rope_scaling": {"factor": 2.0}, "rope_parameters": {"factor": 3.0}},
        "rope_parameters=.* and rope_scaling=.* are one field",
    ),
    ({"num_recursions": 2, "router_capacities": [1.0]}, "2 needs one for each depth"),
    ({"num_recursions": 2, "router_capacities": 0.5}, "=0.5 must be a list of 2 numbers"),
    ({"num_recursions": 2, "router_capacities": ["1", 0.5]}, "must be a list of 2 numbers"),
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
    optional |= {"add_bos_token", "eos_token_id", "exit_loss_weights", "router_init_bias"}
    optional |= {
        "image_size",
        "patch_size",
        "stem_channels",
        "stem_strides",
        "num_mel_bins",
        "image_token_id",
        "audio_token_id",
    }  # of images and sounds alone
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


def test_what_transformers_writes_is_accepted() -> None:
    """Its own fields, its older names for them, and other architectures' with a value like ours."""
    own = PretrainedConfig().to_dict()
    found = MoRConfig(**own | MoRConfig().to_dict())
    assert found.to_dict() == MoRConfig().to_dict()
    more = MoRConfig(
        torch_dtype="bfloat16",
        num_labels=3,
        name_or_path="somewhere",
        _name_or_path="somewhere",
        auto_map={"AutoConfig": "x.Y"},
        attn_implementation="sdpa",
        output_attentions=False,
        attention_dropout=0.0,
        hidden_act="silu",
        pretraining_tp=1,
        sliding_window=None,
    )
    assert str(more.dtype) == "torch.bfloat16"
    assert more.num_labels == 3
    assert not hasattr(more, "attention_dropout")


@pytest.mark.parametrize(
    "spelt",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}},
        {"rope_parameters": {"type": "linear", "factor": 2.0}, "rope_theta": 5e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 5e4},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 5e4}},
        {"rope_parameters": {"factor": 2.0, "rope_type": "linear", "partial_rotary_factor": 1.0,
                             "rope_theta": 5e4}},
    ],
)  # fmt: skip
def test_every_spelling_of_rope_is_one(spelt: dict[str, Any]) -> None:
    found = MoRConfig(**spelt).rope_parameters
    assert found == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}


def test_a_field_that_a_newer_version_wrote_is_refused(tmp_path: Any) -> None:
    MoRConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"router_memory": 4}))
    with pytest.raises(ConfigError, match="router_memory is no field of MoRConfig"):
        MoRConfig.from_pretrained(tmp_path)


def test_fields_in_from_pretrained_are_checked_like_any(tmp_path: Any) -> None:
    given = {"num_recursions": 2, "num_prelude_layers": 0, "hidden_size": 32, "vocab_size": 64}
    MoRForCausalLM(MoRConfig(**given, num_recursion_layers=1)).save_pretrained(tmp_path)
    for kind in (MoRConfig, MoRForCausalLM):
        with pytest.raises(ConfigError, match=r"num_recursion is no field .* 'num_recursions'"):
            kind.from_pretrained(tmp_path, num_recursion=3)
        with pytest.raises(ConfigError, match="router_capacities"):
            kind.from_pretrained(tmp_path, num_recursions=3)
    more = {"num_recursions": 3, "router_capacities": None}
    config = MoRConfig.from_pretrained(tmp_path, **more)
    assert config.router_capacities == [1.0, pytest.approx(2 / 3), pytest.approx(1 / 3)]
    model = MoRForCausalLM.from_pretrained(tmp_path, **more)
    assert (model.config.num_recursions, model.model.router.num_recursions) == (3, 3)
    # What is meant for somebody else passes, as tokenizers and pipelines send it here too.
    others = {"padding_side": "left", "use_fast": True, "device_map": "cpu", "trust_remote_code": 1}
    assert MoRConfig.from_pretrained(tmp_path, **others).num_recursions == 2
    _, unused = MoRConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **others)
    assert "padding_side" in unused
