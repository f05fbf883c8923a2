"""A model made from another, written whole or not at all, with what belongs beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        for name, content in (notes or {}).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return out
