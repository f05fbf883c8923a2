"""Where ``mor compress`` begins: the source as a plain model of ours, texts as prepared data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from mor.compress.settings import Settings
from mor.data import DataIndex, prepare
from mor.data.progress import Progress
from mor.errors import MorError
from mor.folder.tokenizer import tokenizer_beside
from mor.folder.weights import read_mapping
from mor.hf.convert.convert import convert_gguf, convert_llama
from mor.hf.convert.hub import fetch_checkpoint, looks_like_name
from mor.run_files import CONFIG, model_folder


def find_source(settings: Settings, tell: Callable[[str], None]) -> str:
    """The folder of the source as a vanilla model of ours; converted where it is none.

    Raises:
        MorError: it does not exist, or cannot be converted.
    """
    given = settings.source
    if looks_like_name(given):
        tell(f"source: fetching {given} from the Hub")
        path = fetch_checkpoint(given)
    else:
        path = Path(given).expanduser()
    converted = settings.out / "source"
    shutil.rmtree(converted, ignore_errors=True)  # of a step that was stopped
    if path.is_file():
        return str(convert_gguf(path, converted))
    if not path.is_dir():
        raise MorError(
            f"source {given!r} does not exist; give a model folder, a GGUF file, or a Hub name"
        )
    mapping = path / CONFIG
    if mapping.is_file() and read_mapping(mapping).get("model_type") != "mor":
        return str(convert_llama(path, converted))
    return str(model_folder(path))


def find_data(
    settings: Settings, source: Path, tell: Callable[[str], None], progress: Progress
) -> str:
    """The prepared folder: the one given, or one made from the texts given.

    Raises:
        MorError: it was prepared with another tokenizer, or texts cannot be read.
    """
    given = Path(settings.data).expanduser()
    if (given / "index.json").is_file():
        tokenizer_beside(source, DataIndex.load(given))
        return str(given)
    tell(f"data: preparing {settings.data} with the source's tokenizer")
    out = settings.out / "data"
    prepare(settings.data, out, tokenizer=source, progress=progress)
    return str(out)
