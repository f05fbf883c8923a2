"""The model card of a finished run: ``RUN/model/README.md``, for people and for the Hub.

What the run's own files say, and a small evaluation whose size stands on the card. Licence,
language, intended use and limits are for the author of the model to say: nothing is invented here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

import mor
from mor.data import DataIndex, PackedDataset
from mor.data.media import MediaDataset
from mor.disk import write_whole
from mor.errors import MorError
from mor.eval.captions import evaluate_captions
from mor.eval.card_text import front, kind_of, model_rows, score_section, table, use_section
from mor.eval.evaluate import evaluate
from mor.eval.examples import evaluate_examples
from mor.eval.keep import run_of
from mor.eval.media_card import media_card_text
from mor.hf.load import load_media_model, load_model
from mor.hf.load_media import load_processor
from mor.run_files import MODEL, RECIPE, SUMMARY
from mor.train import Recipe, load_recipe

CARD = "README.md"
# The evaluation of a card: at most so many sequences, and about so many tokens.
SEQUENCES, TOKENS = 64, 32_768
# What a card takes from a run's summary, come what may.
NEEDED = (
    *("name", "family", "router", "num_recursions", "parameters", "non_embedding_parameters"),
    "versions",
)


def write_card(
    run: Path,
    *,
    model: Any = None,
    data: Path | None = None,
    max_sequences: int | None = None,
) -> Path:
    """Evaluate the model of a finished run on its validation data and write its card.

    Args:
        run: a run folder with ``recipe.yaml``, ``summary.json`` and ``model/``.
        model: the run's model, wherever it should be evaluated; default loaded on the CPU.
        data: the prepared data folder, where it is no longer where the recipe says.
        max_sequences: validation sequences to look at; default 64, or as many as hold 32,768
            tokens if that is fewer.

    Returns:
        The card.

    Raises:
        MorError: the run is not finished, or its data is not there or does not fit.
    """
    run = run_of(run) or run
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        missing = [name for name in NEEDED if name not in summary]
    except (OSError, ValueError, TypeError):
        raise MorError(f"{run} is no finished run: {SUMMARY} is missing or damaged") from None
    if missing:
        raise MorError(f"{run / SUMMARY} is damaged: {missing[0]} is missing")
    recipe = load_recipe(run / RECIPE)
    section = recipe.data
    if section.kind == "captions":
        text = _score_captions(run, recipe, summary, model, data, max_sequences)
        return _write(run, text)
    if section.kind != "text":
        text = _score_media(recipe, summary, model or load_media_model(run), data, max_sequences)
        return _write(run, text)
    folder = data or section.folders[0][0]
    dataset = PackedDataset(folder, section.validation_split, section.seq_len)
    if max_sequences is None:
        max_sequences = min(SEQUENCES, max(1, TOKENS // section.seq_len))
    scores = evaluate(
        load_model(run) if model is None else model,
        dataset,
        max_sequences=max_sequences,
        batch_size=min(max_sequences, recipe.train.batch_size),
    )
    return _write(run, card_text(recipe, summary, scores, dataset.index))


def _score_media(
    recipe: Recipe, summary: dict[str, Any], model: Any, data: Path | None, count: int | None
) -> str:
    """The card of a run on images or sounds."""
    folder = data or recipe.data.folders[0][0]
    dataset = MediaDataset(folder, recipe.data.validation_split)
    if model.config.head_type != "classes":
        raise MorError(f"head_type={model.config.head_type!r} has no scores to put on a card yet")
    scores = evaluate_examples(model, dataset, max_examples=count or 4 * SEQUENCES)
    rows = _training(summary)
    return media_card_text(recipe, summary, scores, model.config, dataset.index, rows)


def _score_captions(
    run: Path,
    recipe: Recipe,
    summary: dict[str, Any],
    model: Any,
    data: Path | None,
    count: int | None,
) -> str:
    """The card of a run on pictures or recordings and what is said of them."""
    dataset = MediaDataset(data or recipe.data.folders[0][0], recipe.data.validation_split)
    model = load_model(run) if model is None else model
    scores = evaluate_captions(model, load_processor(run), dataset, samples=count or SEQUENCES)
    rows = _training(summary)
    return media_card_text(recipe, summary, scores, model.config, dataset.index, rows)


def _write(run: Path, text: str) -> Path:
    out = run / MODEL / CARD
    try:
        write_whole(out, text)
    except OSError as error:
        raise MorError(f"{out} cannot be written: {error.strerror or error}") from None
    return out


def card_text(
    recipe: Recipe, summary: dict[str, Any], scores: dict[str, Any], index: DataIndex
) -> str:
    """The card as Markdown under YAML front matter.

    Args:
        recipe: of the run. summary: its ``summary.json``.
        scores: of :func:`mor.eval.evaluate`.
        index: of the data.
    """
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
    total, inner = summary["parameters"], summary["non_embedding_parameters"]
    sections = [
        front(summary["family"], summary["router"])
        + f"# {summary['name']}\n\n{kind_of(summary['family'], summary['num_recursions'])}, "
        f"trained with `mor` {mor.__version__}.",
        "## Scores\n\n" + score_section(scores),
        "## Model\n\n" + table(("", "value"), model_rows(config, total, inner)),
        "## Training\n\n" + table(("", "value"), _training(summary)),
        "## Data\n\n" + table(("", "value"), _data(recipe, index)),
        "## Use\n\n" + use_section(),
        "## Recipe\n\nEvery default written out; `mor train recipe.yaml` runs it again.\n\n"
        "```yaml\n" + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False) + "```",
        "## Left to the author\n\nLicence, language, intended use, limits, and what is in the data "
        "that should be known. Nothing about them follows from a training run.",
    ]
    return "\n\n".join(sections) + "\n"


def _training(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What it cost, on what, by which code; what is not known is left out."""
    forms = {
        "tokens": ("tokens", "{:,}"),
        "steps": ("steps", "{:,}"),
        "train_flops": ("training FLOPs, as planned", "{:z.4g}"),
        "eval_nll": ("last validation NLL while training", "{:z.4f}"),
        "wall_s": ("seconds", "{:z,.0f}"),
        "tokens_per_s": ("tokens/s", "{:z,.0f}"),
        "mfu": ("model FLOPs utilisation", "{:z.1%}"),
        "peak_memory_bytes": ("peak memory (bytes)", "{:,}"),
        "dtype": ("dtype", "{}"),
        "seed": ("seed", "{}"),
        "machine": ("hardware", "{}"),
        "commit": ("commit", "`{}`"),
        "command": ("command", "`{}`"),
    }
    rows = [
        (name, form.format(summary[key]))
        for key, (name, form) in forms.items()
        if summary.get(key) is not None
    ]
    versions = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return [*rows, ("versions", versions)]


def _data(recipe: Recipe, index: DataIndex) -> list[tuple[str, str]]:
    section = recipe.data
    mixed = [f"{weight:zg} x `{path}`" for path, weight in section.folders]
    rows = [("folders, by weight", ", ".join(mixed))] if section.mixture else []
    rows += [("scored on folder" if section.mixture else "folder", f"`{index.directory}`")]
    rows += [("source", f"`{index.source}`")]
    rows += [("made by", f"`{index.command}`")] if index.command else []
    for split in (section.train_split, section.validation_split):
        rows.append((f"tokens of `{split}`", f"{index.num_tokens(split):,}"))
    rows.append(("tokenizer", f"in this folder; vocabulary {index.vocab_size:,}"))
    masked = ", documents apart" if section.document_mask else ""
    rows.append(("packing", section.packing + masked))
    return [*rows, ("sequence length in training", f"{section.seq_len:,}")]
