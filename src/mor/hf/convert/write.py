"""A model made from another, written whole or not at all, with what belongs beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mor.data.bos import apply_bos, model_bos
from mor.folder.weights import read_mapping
from mor.hf.bos import record_bos, tokenizer_of
from mor.hf.convert.files import check_tokenizer, copy_companions, new_folder
from mor.hf.modeling import MoRForCausalLM


def write_model(
    model: MoRForCausalLM, companions: Path, out: Path, notes: dict[str, Any] | None = None
) -> Path:
    """Write ``model`` to the new folder ``out``.

    Args:
        model: what to save.
        companions: the folder whose tokenizer and generation settings come along.
        out: a new or empty folder.
        notes: how the model was made, by the name of a JSON file.

    Raises:
        ConversionError: the tokenizer does not fit the model, ``out`` exists, the disk refuses.
    """
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_companions(companions, folder)
        check_tokenizer(folder, model.config.vocab_size, companions)
        keep_policy(model, companions, folder)
        for name, content in (notes or {}).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out


def keep_policy(model: MoRForCausalLM, companions: Path, folder: Path) -> None:
    """Write down how the texts of a model begin, and let the tokenizer beside it do the same.

    Args:
        model: its configuration is changed where it does not say it yet.
        companions: whose tokenizer is the one that the model was trained with.
        folder: where model and companions have been written; changed where need be.
    """
    theirs, ours = tokenizer_of(companions), tokenizer_of(folder)
    if theirs is None or ours is None:
        return
    before = model.config.bos_token_id, model.config.add_bos_token
    source = companions / "config.json"
    kind = read_mapping(source).get("model_type") if source.is_file() else None
    record_bos(model, theirs, imported=kind != model.config.model_type)
    if (model.config.bos_token_id, model.config.add_bos_token) != before:
        model.config.save_pretrained(folder)
        settings = folder / "generation_config.json"
        if settings.is_file():
            written = json.loads(settings.read_text("utf-8"))
            if written.get("bos_token_id") == before[0]:
                written["bos_token_id"] = model.config.bos_token_id
                settings.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    if model.config.add_bos_token is not None:
        adapted = apply_bos(ours, model_bos(model.config))
        if adapted is not ours:
            adapted.save_pretrained(folder)
