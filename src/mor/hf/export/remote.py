"""A folder that loads where ``mor`` is not installed: weights, tokenizer and our code beside them.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from mor.config import MoRConfig
from mor.errors import MorError
from mor.folder.config import load_config
from mor.folder.tokenizer import load_tokenizer
from mor.hf.convert.files import COMPANIONS, check_tokenizer, new_folder
from mor.hf.export.bundle import bundle, flat_name
from mor.hf.register import CLASSES
from mor.run_files import CONFIG, PROCESSOR, TOKENIZER, model_folder

_README = """---
library_name: transformers
---

# {name}

A Mixture-of-Recursions language model. The modelling code lies beside the weights:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

It needs torch and Transformers 5.10 or newer, below 6, and nothing else. Decoding is causal: every
token's depth is decided from its own state.
"""


def export_hf(folder: Path, out: Path) -> Path:
    """Write a model with its code to the new folder ``out``.

    Args:
        folder: a model folder, or a finished run's folder; of any of our classes.
        out: a new or empty folder.

    Returns:
        ``out``.

    Raises:
        MorError: no model there, weights or tokenizer missing or damaged, ``out`` is not empty.
    """
    source = model_folder(folder)
    config = load_config(source)
    kind = _class_of(config, source)
    weights = sorted(source.glob("*.safetensors"))
    _check_weights(kind, config, weights, source)
    check_tokenizer(source, config.vocab_size, source)
    if (source / TOKENIZER).is_file():
        load_tokenizer(source)  # or the copy would be found broken where it is used
    with new_folder(out) as target:
        for path in (*weights, *(source / name for name in (*COMPANIONS, PROCESSOR, "README.md"))):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
        index = source / "model.safetensors.index.json"
        if index.is_file():
            shutil.copyfile(index, target / index.name)
        config.architectures = [kind.__name__]
        config.auto_map = {"AutoConfig": _reference(MoRConfig)} | {
            auto: _reference(of) for auto, of in CLASSES.items()
        }
        config.save_pretrained(target)
        for name, text in bundle().items():
            (target / name).write_text(text, encoding="utf-8")
        if not (target / "README.md").exists():
            (target / "README.md").write_text(_README.format(name=out.name), encoding="utf-8")
    return out


def _class_of(config: MoRConfig, source: Path) -> type:
    named = (config.architectures or ["MoRForCausalLM"])[0]
    for kind in CLASSES.values():
        if named in (kind.__name__, f"FSDP{kind.__name__}"):
            return kind
    known = ", ".join(kind.__name__ for kind in CLASSES.values())
    raise MorError(f"{source / CONFIG}: architectures={config.architectures} is none of {known}")


def _reference(kind: type) -> str:
    """``file.Class``, as an ``auto_map`` has it."""
    return f"{flat_name(kind.__module__)}.{kind.__name__}"


def _check_weights(kind: type, config: MoRConfig, files: list[Path], source: Path) -> None:
    """Refuse a folder whose weights are not those of the configuration, before copying them."""
    found: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118  # it is no dictionary
                    found[name] = stored.get_slice(name).get_shape()
        except Exception as error:  # the library raises whatever a broken file happens to cause
            raise MorError(f"{path} is damaged or cut short: {error}") from error
    with torch.device("meta"):
        wanted = kind(config).state_dict()
    if config.tie_word_embeddings:
        wanted.pop("model.lm_head.weight", None)
    for name, tensor in wanted.items():
        if found.get(name) != list(tensor.shape):
            has = f"has shape {found[name]}" if name in found else "is missing"
            raise MorError(
                f"{source}: the weight {name} {has}; {CONFIG} says {list(tensor.shape)}; save or "
                "convert the model anew (as safetensors)"
            )
