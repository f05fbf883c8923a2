"""A checkpoint by its name on the Hub, where a hub can be reached."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mor.folder.weights import ConversionError, one_line

WANTED = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.txt"]
PICKLED = [*WANTED, "*.bin"]


def looks_like_name(source: str | Path) -> bool:
    """Whether ``source`` may be a model's name, ``owner/name`` or ``name``, and is no path here."""
    text = str(source)
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", text) is not None
    return named and not Path(text).exists()


def fetch_checkpoint(name: str) -> Path:
    """Download a checkpoint's configuration, weights and tokenizer, or find them in the cache.

    Safetensors are preferred; ``.bin`` files are fetched only where there are none.

    Raises:
        ConversionError: no such model, no access, or no connection.
    """
    try:
        folder = Path(snapshot_download(name, allow_patterns=WANTED))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=PICKLED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{name!r} is neither a folder here nor a model that the Hub gave: {one_line(error)}"
        ) from None
    return folder
