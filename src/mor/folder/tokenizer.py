"""The tokenizer in a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mor.config import MoRConfig
from mor.data.index import DataIndex
from mor.data.tokenizer import load_tokenizer as load_data_tokenizer
from mor.errors import MorError
from mor.folder.weights import one_line
from mor.run_files import TOKENIZER, beside_model, model_folder

# Of these AutoTokenizer makes nothing else, and to import it means to look through all models.
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside the model.

    Raises:
        MorError: there is none, or it is damaged.
    """
    folder = model_folder(Path(folder))
    if not (folder / TOKENIZER).is_file():
        raise MorError(f"{folder} holds no tokenizer ({TOKENIZER}, tokenizer.json)")
    try:
        named = json.loads((folder / TOKENIZER).read_text("utf-8")).get("tokenizer_class")
        kind: Any = PreTrainedTokenizerFast if named in PLAIN else _any_kind()
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises whatever a broken file happens to cause
        raise MorError(f"the tokenizer in {folder} is damaged: {one_line(error, 200)}") from error


def _any_kind() -> Any:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.register("mor", MoRConfig, exist_ok=True)  # AutoTokenizer reads config.json too
    return AutoTokenizer


def tokenizer_beside(folder: str | Path, index: DataIndex) -> Any:
    """The tokenizer beside a model; None where the model came without one.

    Raises:
        MorError: the data was prepared with another: the model would read nonsense.
    """
    found = beside_model(Path(folder), TOKENIZER)
    if found is None:
        return None
    ours = load_tokenizer(found.parent)
    vocabulary, theirs = ours.get_vocab(), load_data_tokenizer(index.tokenizer_dir).get_vocab()
    wrong = [token for token, number in theirs.items() if vocabulary.get(token) != number]
    if wrong:
        raise MorError(
            f"{index.directory} was prepared with another tokenizer than that of {folder} "
            f"({len(wrong)} tokens differ, such as {min(wrong)!r}); prepare the text again with "
            f"--tokenizer {found.parent}"
        )
    return ours
