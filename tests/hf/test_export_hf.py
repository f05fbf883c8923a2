"""``mor export hf``: the folder loads and computes the same where ``mor`` cannot be imported."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from mor import MoRConfig, MorError, MoRForSequenceClassification
from mor.cli.merge import merge
from mor.hf.convert.convert import convert_llama
from mor.hf.export import plain_native
from mor.hf.export.bundle import bundle
from mor.hf.export.llama import export_llama
from mor.hf.export.remote import export_hf
from mor.hf.load import load_model
from mor.ops import native
from tests.strategies import make_model, random_ids, small_config

IDS = random_ids(1, 2, 12).clamp(min=1)
CONFIGS: dict[str, dict[str, Any]] = {
    "threshold": {"router": "threshold", "router_architecture": "wide_mlp"},
    "expert_choice": {"router": "expert_choice", "kv_sharing": "recursive"},
    "token_choice": {"router": "token_choice", "tie_word_embeddings": False},
    "fixed": {"router": "fixed", "recursion_seam": "norm_inject", "relaxation": "lora"},
    "random": {"router": "random", "recursion_streams": 2, "update_rule": "residual"},
}
# Runs without the site's .pth files, where an editable install would stand, and refuses the name.
PROGRAM = """
import sys
sys.path[:0] = sys.argv[2:]
sys.modules["mor"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
out = {}
for folder in sorted(Path(sys.argv[1]).glob("*/")):
    kind = AutoModelForSequenceClassification if folder.name == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, trust_remote_code=True)
    ids = torch.load(folder.parent / "ids.pt")
    with torch.no_grad():
        out[folder.name] = [model(ids).logits]
        if folder.name != "reward":
            how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
            out[folder.name].append(model.generate(ids, attention_mask=ids * 0 + 1, **how))
    if folder.name == "threshold":
        model.save_pretrained(folder.parent / "again" / "saved")
        again = kind.from_pretrained(folder.parent / "again" / "saved", trust_remote_code=True)
        with torch.no_grad():
            out["saved"] = [again(ids).logits]
        model.train()(ids, labels=ids).loss.backward()
        assert model.model.router.net.weight.grad is not None
assert sys.modules["mor"] is None
torch.save(out, Path(sys.argv[1]) / "found.pt")
"""


def test_every_model_loads_without_mor(tmp_path: Path) -> None:
    models: dict[str, Any] = {
        name: make_model(small_config(**fields)) for name, fields in CONFIGS.items()
    }
    torch.manual_seed(0)
    reward = MoRForSequenceClassification(small_config("threshold", num_labels=1)).eval()
    reward.config.pad_token_id = 0
    for name, model in (models | {"reward": reward}).items():
        model.save_pretrained(tmp_path / "sources" / name)
        export_hf(tmp_path / "sources" / name, tmp_path / "exported" / name)
    torch.save(IDS, tmp_path / "exported" / "ids.pt")
    paths = {str(Path(package.__file__).parents[1]) for package in (torch, transformers)}
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-S", "-c", PROGRAM, str(tmp_path / "exported"), *paths]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "exported" / "found.pt")
    for name, model in models.items():
        with torch.no_grad():
            assert_close(found[name][0], model(IDS).logits, atol=1e-5, rtol=1e-5)
        how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        wanted = model.generate(IDS, attention_mask=torch.ones_like(IDS), **how)
        assert torch.equal(found[name][1], wanted)
    with torch.no_grad():
        assert_close(found["reward"][0], reward(IDS).logits, atol=1e-5, rtol=1e-5)
    assert_close(found["saved"][0], found["threshold"][0])
    # With mor at hand the folder is a model folder like any other.
    again = load_model(tmp_path / "exported" / "threshold")
    assert again.config.auto_map["AutoModelForCausalLM"] == "modeling_mor.MoRForCausalLM"


def test_the_files_name_nothing_that_is_not_there() -> None:
    files = bundle()
    packages = set()
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{found}.py" in files for found in names), name
            elif isinstance(node, ast.ImportFrom):
                packages.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Import):
                packages |= {alias.name.split(".")[0] for alias in node.names}
    others = packages - sys.stdlib_module_names
    assert others == {"torch", "transformers"}
    # Transformers copies what it finds by such lines, from file to file.
    assert all(
        f"from .{name[:-3]} import" in "".join(files.values())
        for name in files
        if (name not in ("configuration_mor.py", "modeling_mor.py", "mor_hf_heads.py"))
        and name not in ("mor_hf_media.py", "mor_hf_next_frame.py")
    )


def test_the_plain_forms_are_what_the_kernels_compute() -> None:
    x, weight = torch.randn(7, 12), torch.randn(3, 5, 12)
    index = torch.randint(0, 3, (7,))
    wanted = torch.stack([weight[i] @ row for i, row in zip(index, x, strict=True)])
    assert_close(plain_native.own_linear(x, weight, index), wanted)
    with torch.no_grad():
        assert not plain_native.fits(x)
        for name in native.POINTWISE:
            found = plain_native.pointwise(name, x)
            if native.fits(x):
                assert_close(found, native.pointwise(name, x), atol=1e-6, rtol=1e-5)
    # Every name of the kernels that the exported modules ask for is there.
    asked = {
        node.attr
        for text in bundle().values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "native"
    }
    assert all(hasattr(plain_native, name) for name in asked)


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MorError, match="does not exist"):
        export_hf(tmp_path / "nothing", tmp_path / "out")
    MoRConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(MorError, match=r"the weight model\.embed_tokens\.weight is missing"):
        export_hf(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = tmp_path / "source"
    make_model(small_config("fixed")).save_pretrained(source)
    told = json.loads((source / "config.json").read_text())
    for change, said in (
        ({"hidden_size": 64}, "has shape"),
        ({"architectures": ["Other"]}, "is none of MoRBaseModel, MoRForAudio"),
    ):
        (source / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(MorError, match=said):
            export_hf(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(told))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text('{"version": 1')
        with pytest.raises(MorError, match=r"the tokenizer .*is damaged"):
            export_hf(source, tmp_path / "out")
        with pytest.raises(MorError, match=r"the tokenizer is damaged"):
            export_llama(source, tmp_path / "llama")
        (source / name).unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "source"]
    export_hf(source, tmp_path / "out")
    with pytest.raises(MorError, match="not empty"):
        export_hf(source, tmp_path / "out")


def test_an_adapter_is_named_as_one(tmp_path: Path) -> None:
    told = {"base_model_name_or_path": "runs/mine/model", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    calls: tuple[Any, ...] = (
        load_model,
        lambda folder: convert_llama(folder, tmp_path / "out"),
        lambda folder: merge(folder, tmp_path / "out"),
    )
    for call in calls:
        with pytest.raises(MorError, match=r"is a PEFT adapter \(LORA\) of 'runs/mine/model'"):
            call(tmp_path)
