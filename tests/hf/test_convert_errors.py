"""Checkpoints that cannot be converted: each mistake is named, and nothing is half-written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mor import MorError, MoRForCausalLM
from mor.hf.convert.convert import convert_authors, convert_llama
from tests.hf.checkpoints import CYCLE, EXPERT, TOKEN, VANILLA, assign, convert, golden, load, write

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def drop(name: str) -> Change:
    return lambda weights, config: weights.pop(name)


def disturb(name: str) -> Change:
    return lambda weights, config: weights.update({name: weights[name] + 1})


def configure(path: str, value: Any) -> Change:
    return lambda weights, config: assign(config, path, value)


def add(name: str) -> Change:
    return lambda weights, config: weights.update({name: torch.zeros(2)})


def quantise(name: str) -> Change:
    return lambda weights, config: weights.update({name: weights[name].to(torch.int8)})


BLOCK = "model.layers.2.block.1"
REFUSED: list[tuple[str, Change, str]] = [
    (VANILLA, drop("model.layers.5.mlp.up_proj.weight"), r"layers\.5\.mlp\.up_proj\.weight is mis"),
    (
        EXPERT,
        drop(f"{BLOCK}.mlp.up_proj.weight"),
        r"layers\.2\.block\.1\.mlp\.up_proj.* is missing",
    ),
    (
        EXPERT,
        drop("model.layers.3.mor_router.router.weight"),
        r"3\.mor_router\.router\.weight is m",
    ),
    (VANILLA, configure("hf_config.hidden_size", 32), r"has shape \[97, 64\]; .* \[97, 32\]"),
    (VANILLA, configure("hf_config.num_hidden_layers", 5), r"model\.layers\.5.* and \d+ more"),
    (EXPERT, configure("mor.router_type", "mlp"), r"mor_router\.router\.weight and 2 more"),
    (VANILLA, add("model.layers.0.self_attn.q_proj.lora_A.default.weight"), "lora_A.*LoRA"),
    (VANILLA, add("base_model.model.model.norm.weight"), r"base_model\.model\.model\.norm"),
    (CYCLE, add("model.layers.1.recursion_encoding"), "recursion_encoding"),
    (
        EXPERT,
        disturb(f"{BLOCK}.self_attn.q_proj.weight"),
        "q_proj.*differ.*untied attention.*82c97",
    ),
    (
        EXPERT,
        disturb(f"{BLOCK}.mlp.up_proj.weight"),
        r"up_proj\.weight are one shared tensor but d",
    ),
    (
        CYCLE,
        disturb("model.layers.3.self_attn.q_proj.weight"),
        "layers.1.self.*layers.3.self.*diffe",
    ),
    (
        CYCLE,
        disturb("model.layers.3.input_layernorm.weight"),
        "differ; set recursive.ln_share to f",
    ),
    (EXPERT, disturb("lm_head.weight"), "embed_tokens.weight and lm_head.weight are one shared"),
    (VANILLA, configure("hf_config", 3), "hf_config=3"),
    (VANILLA, configure("hf_config.vocab_size", None), "vocab_size is missing"),
    (VANILLA, configure("hf_config.num_attention_heads", 0), "num_attention_heads is 0"),
    (
        VANILLA,
        configure("hf_config.rms_norm_eps", "small"),
        "rms_norm_eps.*(expected float|must be a number)",
    ),
    (VANILLA, configure("hf_config.hidden_act", "gelu"), "hidden_act='gelu'"),
    (VANILLA, configure("relaxation", {"enable": True}), r"relaxation\.enable=true"),
    (VANILLA, configure("mor", {"enable": True, "type": "expert"}), r"mor\.enable=True"),
    (VANILLA, configure("kv_sharing.enable", True), r"kv_sharing\.num_recursion"),
    (CYCLE, configure("kv_sharing", {"enable": True, "num_recursion": 2}), r"num_recursion=2"),
    (CYCLE, configure("kv_sharing", {"enable": True, "sharing": "sequence"}), "sharing='sequence'"),
    (CYCLE, configure("recursive.enable", "yes"), r"recursive\.enable='yes'"),
    (CYCLE, configure("recursive.num_recursion", None), r"recursive\.num_recursion=None"),
    (CYCLE, configure("recursive.num_recursion", 9), "num_recursions=9"),
    (CYCLE, configure("recursive.sharing", "spiral"), r"recursive\.sharing='spiral'"),
    (CYCLE, configure("recursive", []), r"recursive=\[\]"),
    (CYCLE, configure("kv_sharing", {"enable": True, "update_cache": True}), "update_cache=True"),
    (VANILLA, quantise("model.norm.weight"), r"norm\.weight has dtype torch\.int8"),
    (EXPERT, configure("mor.type", "both"), r"mor\.type='both'"),
    (EXPERT, configure("mor.router_type", "deep"), r"mor\.router_type='deep'"),
    (EXPERT, configure("mor.temp", "hot"), r"mor\.temp='hot'"),
    (EXPERT, configure("mor.temp", "nan"), r"mor\.temp='nan'"),
    (EXPERT, configure("mor.temp", True), r"mor\.temp=True"),
    (EXPERT, configure("mor.capacity", "1.0,0.5"), r"router_capacities=\[1\.0, 0\.5\]"),
    (EXPERT, configure("mor.capacity", "1.0,0.5,0.7"), "rises with depth"),
    (EXPERT, configure("mor.capacity", "all"), r"mor\.capacity='all'"),
    (EXPERT, configure("mor.capacity", 5), r"mor\.capacity=5"),
    (EXPERT, lambda w, c: c["mor"].update(z_loss=True, z_coeff=None), r"mor\.z_coeff=None"),
    (EXPERT, configure("mor.expert", 1), r"mor\.expert=1"),
    (EXPERT, configure("mor.expert.sampling", "none"), r"mor\.expert\.sampling='none'"),
    (EXPERT, configure("mor.expert.router_func", "relu"), r"mor\.expert\.router_func='relu'"),
    (EXPERT, configure("mor.expert.cap_warmup_step", -1), r"cap_warmup_step=-1"),
    (EXPERT, configure("recursive.sharing", "middle_sequence"), r"recursive\.sharing='middle_seq"),
    (TOKEN, configure("recursive.sharing", "cycle"), r"mor\.type='token'.*middle_cycle"),
    (TOKEN, configure("mor.rand_router", True), r"mor\.rand_router=True"),
    (TOKEN, configure("mor.token.balancing", "luck"), r"mor\.token\.balancing='luck'"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    name: str, change: Change, words: str, tmp_path: Path
) -> None:
    weights, config = golden(name)
    change(weights, config)
    sources = write(tmp_path / "in", weights, config)
    with pytest.raises(MorError, match=words) as caught:
        convert_authors(*sources, tmp_path / "deep" / "out")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_sharing_that_use_cache_switched_off_is_asked_about(tmp_path: Path) -> None:
    weights, config = golden("recursive_middle_cycle_r3_kvshare")
    config["hf_config"]["use_cache"] = False
    with pytest.raises(MorError, match="use_cache=false switched kv_sharing off"):
        convert(tmp_path, weights, config)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_a_file_cut_short(ending: str, kept: float, tmp_path: Path) -> None:
    weights, run = write(tmp_path, *golden(VANILLA))
    if ending == ".bin":
        weights = tmp_path / "pytorch_model.bin"
        torch.save(golden(VANILLA)[0], weights)
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept if kept > 1 or not kept else kept * len(content))])
    with pytest.raises(MorError, match=f"{weights.name}: cut short"):
        convert_authors(weights, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Intruder:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("intruder-was-here",)


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, run = write(tmp_path, *golden(VANILLA))
    for save in (torch.save, lambda thing, file: Path(file).write_bytes(pickle.dumps(thing))):
        save({"model.norm.weight": Intruder()}, tmp_path / "evil.bin")
        with pytest.raises(MorError, match=r"evil\.bin: cut short, or not plain weights"):
            convert_authors(tmp_path / "evil.bin", run, tmp_path / "out")
    assert not (tmp_path / "intruder-was-here").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "ending", "words"),
    [
        ('{"hf_config": ', ".json", "not valid JSON"),
        ("[1]", ".json", "holds a list"),
        ("a: [", ".yaml", "not valid YAML"),
        ("just words", ".yml", "holds a str"),
        ("\xff", ".json", "not valid JSON"),
        ("{}", ".json", "hf_config is missing, and there is no config.json"),
    ],
)
def test_a_configuration_that_cannot_be_read(
    text: str, ending: str, words: str, tmp_path: Path
) -> None:
    weights, _ = write(tmp_path, *golden(VANILLA))
    config = tmp_path / f"broken{ending}"
    config.write_text(text, "latin-1")
    with pytest.raises(MorError, match=words) as caught:
        convert_authors(weights, config, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    weights, run = write(tmp_path / "in", *golden(VANILLA))
    with pytest.raises(MorError, match=r"nowhere\.safetensors does not exist"):
        convert_authors(tmp_path / "nowhere.safetensors", run, tmp_path / "out")
    with pytest.raises(MorError, match=r"nowhere\.json: cannot read"):
        convert_authors(weights, tmp_path / "nowhere.json", tmp_path / "out")
    with pytest.raises(MorError, match="no weights here; expected one of"):
        convert_authors(tmp_path, run, tmp_path / "out")
    with pytest.raises(MorError, match="does not exist"):
        convert_llama(tmp_path / "nowhere", tmp_path / "out")


def test_nothing_is_overwritten_and_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    sources = write(tmp_path / "in", *golden(VANILLA))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(MorError, match="is a file"):
        convert_authors(*sources, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("precious")
    with pytest.raises(MorError, match="not empty"):
        convert_authors(*sources, tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    assert load(convert_authors(*sources, tmp_path / "empty"))
    with pytest.raises(MorError, match="cannot write"):
        convert_authors(*sources, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError(28, "No space left on device"), MorError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_write_that_fails_leaves_nothing(
    error: BaseException,
    raised: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = write(tmp_path / "in", *golden(VANILLA))

    def fail(self: Any, folder: Path, *args: Any, **kwargs: Any) -> None:
        (Path(folder) / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(MoRForCausalLM, "save_pretrained", fail)
    with pytest.raises(raised) as caught:
        convert_authors(*sources, tmp_path / "out")
    assert raised is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
