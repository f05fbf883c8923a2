"""The card of a model that no run of ours trained: converted, folded, calibrated or merged.

It says what the folder itself says. Scores are there where prepared data was given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mor
from mor.data import VALIDATION, DataIndex, PackedDataset
from mor.disk import write_whole
from mor.errors import MorError
from mor.eval.card_text import front, kind_of, model_rows, score_section, table, use_section
from mor.eval.evaluate import evaluate
from mor.folder.levels import load_levels
from mor.hf.bos import tokenizer_of
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.model.flops import count_parameters
from mor.run_files import SHIPPED, model_folder

CARD, FOLD = "README.md", "fold.json"
OURS = "mixture-of-recursions"  # in the front matter of every card of ours


def write_folder_card(
    folder: Path,
    *,
    model: MoRForCausalLM | None = None,
    data: Path | None = None,
    max_sequences: int = 64,
    tokens: int = 32_768,
) -> Path:
    """Write ``README.md`` into a model folder that is no run's.

    Args:
        folder: as `mor convert`, `fold`, `calibrate` and `merge` write it.
        model: its model, wherever it should be evaluated; default loaded on the CPU, for scores.
        data: a prepared data folder, made with the model's tokenizer; None: no scores.
        max_sequences: validation sequences to look at.
        tokens: of all of them together, about.

    Returns:
        The card.

    Raises:
        MorError: no model folder, a card of another's hand is there already, or data does not fit.
    """
    folder = model_folder(folder)
    out = folder / CARD
    if folder.is_relative_to(SHIPPED):
        raise MorError(f"{folder.name} ships with mor and has its card: {out}")
    if out.is_file() and OURS not in out.read_text("utf-8", "replace").partition("\n---")[0]:
        raise MorError(f"{out} was not written by mor card; move it away, nothing is overwritten")
    model = load_model(folder) if model is None else model
    scores: dict[str, Any] | None = None
    if data is not None:
        length = min(512, model.config.max_position_embeddings)
        count = min(max_sequences, max(1, tokens // length))
        dataset = PackedDataset(data, VALIDATION, length)
        words = tokenizer_of(folder)
        _check_tokenizer(words, dataset.index)
        scores = evaluate(model, dataset, max_sequences=count, batch_size=min(count, 8))
    try:
        write_whole(out, card_text(folder, model, scores))
    except OSError as error:
        raise MorError(f"{out} cannot be written: {error.strerror or error}") from None
    return out


def _check_tokenizer(words: Any, index: DataIndex) -> None:
    """Refuse data whose ids mean other words than the model's."""
    if words is not None and len(words) != index.vocab_size:
        raise MorError(
            f"{index.directory} has a vocabulary of {index.vocab_size}, the model's tokenizer one "
            f"of {len(words)}; prepare the data with it (mor data prepare --tokenizer DIR)"
        )


def card_text(folder: Path, model: MoRForCausalLM, scores: dict[str, Any] | None) -> str:
    """The card as Markdown under YAML front matter.

    Args:
        folder: of the model.
        model: what is in it.
        scores: of :func:`mor.eval.evaluate`; None where it was not evaluated.
    """
    config = model.config
    total, inner = count_parameters(config)
    scored = (
        score_section(scores)
        if scores is not None
        else f"Not evaluated; `mor card {folder.name} --data DIR` does."
    )
    sections = [
        front(config.family, config.router if config.num_recursions > 1 else "none")
        + f"# {folder.name}\n\n{kind_of(config.family, config.num_recursions)}, "
        f"written by `mor` {mor.__version__}. {_origin(folder)}",
        "## Scores\n\n" + scored,
        "## Model\n\n" + table(("", "value"), model_rows(config, total, inner)),
        *_fold(folder),
        *_levels(folder),
        "## Use\n\n" + use_section(),
        "## Left to the author\n\nLicence, language, intended use, limits, where the weights come "
        "from, and what is in the data that should be known. Nothing about them follows from "
        "these files.",
    ]
    return "\n\n".join(sections) + "\n"


def _notes(folder: Path) -> dict[str, Any] | None:
    """What ``mor fold`` wrote down."""
    try:
        found: dict[str, Any] = json.loads((folder / FOLD).read_text("utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def _origin(folder: Path) -> str:
    if _notes(folder) is not None:
        return (
            "Its layers were folded out of another model's (see Folding); a fold that was not "
            "trained on afterwards (`mor uptrain`) writes poor text."
        )
    return "No run of `mor train` is beside it: how it was trained is not recorded here."


def _fold(folder: Path) -> list[str]:
    notes = _notes(folder)
    if notes is None:
        return []
    rows = [
        (name, f"{value}") for name, value in notes.items() if not isinstance(value, dict | list)
    ]
    return ["## Folding\n\n" + table(("", "value"), rows)]


def _levels(folder: Path) -> list[str]:
    levels = load_levels(folder)
    if levels is None:
        return []
    rows = [
        (
            f"{level.capacity:zg}",
            ", ".join(f"{share:z.3g}" for share in level.capacities),
            ", ".join(f"{boundary:z.4g}" for boundary in level.boundaries),
        )
        for level in levels.levels
    ]
    head = ("capacity factor", "share of tokens by depth", "boundaries (logits)")
    return ["## Capacities that a request may choose\n\n" + table(head, rows)]
