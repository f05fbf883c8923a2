"""The model card of a finished run: ``RUN/model/README.md``, for people and for the Hub.

What the run's own files say, and a small evaluation whose size stands on the card. Licence,
language, intended use and limits are for the author of the model to say: nothing is invented here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import mor
from mor.data import DataIndex, PackedDataset
from mor.disk import write_whole
from mor.errors import MorError
from mor.eval.answers import list_scores
from mor.eval.evaluate import evaluate
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.run_files import MODEL, RECIPE, SUMMARY
from mor.train import Recipe, load_recipe

CARD = "README.md"
# The evaluation of a card: at most so many sequences, and about so many tokens.
SEQUENCES, TOKENS = 64, 32_768


def write_card(
    run: Path,
    *,
    model: MoRForCausalLM | None = None,
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
    try:
        summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MorError(f"{run} is no finished run: {SUMMARY} is missing or damaged") from None
    recipe = load_recipe(run / RECIPE)
    section = recipe.data
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
    out = run / MODEL / CARD
    try:
        write_whole(out, card_text(recipe, summary, scores, dataset.index))
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
    sections = [
        _front(summary) + f"# {summary['name']}\n\n{_sentence(summary)}",
        "## Scores\n\n" + _scores(scores),
        "## Model\n\n" + _table(("", "value"), _model(recipe, summary, index)),
        "## Training\n\n" + _table(("", "value"), _training(summary)),
        "## Data\n\n" + _table(("", "value"), _data(recipe, index)),
        "## Use\n\n" + _use(),
        "## Recipe\n\nEvery default written out; `mor train recipe.yaml` runs it again.\n\n"
        "```yaml\n" + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False) + "```",
        "## Left to the author\n\nLicence, language, intended use, limits, and what is in the data "
        "that should be known. Nothing about them follows from a training run.",
    ]
    return "\n\n".join(sections) + "\n"


def _front(summary: dict[str, Any]) -> str:
    tags = ["mixture-of-recursions", summary["family"], f"router:{summary['router']}"]
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---\n\n"


def _sentence(summary: dict[str, Any]) -> str:
    recursions = summary["num_recursions"]
    kind = {
        "vanilla": "A vanilla Transformer language model",
        "recursive": f"A recursive Transformer language model, {recursions} passes for every token",
        "mor": f"A Mixture-of-Recursions language model, 1 to {recursions} passes per token",
    }[summary["family"]]
    return f"{kind}, trained with `mor` {mor.__version__}."


def _scores(scores: dict[str, Any]) -> str:
    """What is causal, what is not and says so, and what depth is worth."""
    rows = [("causal rule, as in generation", scores["causal"])]
    if scores["leaky"] is not None:
        rows.append(
            ("training's selection: **looks ahead, no measure of the model**", scores["leaky"])
        )
    cells = [
        (
            rule,
            f"{score['nll']:.4f}",
            f"{score['perplexity']:.2f}",
            f"{score['bits_per_byte']:.4f}",
            f"{score['mean_depth']:.2f}",
        )
        for rule, score in rows
    ]
    for cap in scores["depth_cap"] if len(scores["depth_cap"]) > 1 else ():
        name = f"causal rule, at most {cap['max_depth']} of {len(scores['depth_cap'])} recursions"
        cells.append((name, f"{cap['nll']:.4f}", "", "", f"{cap['mean_depth']:.2f}"))
    head = ("rule", "NLL (nats/token)", "perplexity", "bits/byte", "mean depth")
    return (
        f"The first {scores['sequences']:,} sequences of {scores['seq_len']:,} tokens of split "
        f"`{scores['split']}`, {scores['tokens']:,} targets. A small sample: `mor eval` scores all "
        "of it.\n\n" + _table(head, cells) + _answers(scores.get("answers"))
    )


def _answers(answers: dict[str, Any] | None) -> str:
    """Exact match of a task by difficulty; nothing for text, whose NLL above is the measure."""
    if answers is None:
        return ""
    levels = list(answers["causal"]["by_level"])
    cells = [
        (
            name,
            f"{score['exact_match']:.1%}",
            *(f"{score['by_level'][level]:.1%}" for level in levels),
            f"{score['mean_depth']:.2f}",
        )
        for name, score in list_scores(answers)
    ]
    head = ("exact match of answers", "all", *(f"{level}" for level in levels), "mean depth")
    return (
        f"\n\nThe measure of this task is the exact match of its {answers['queries']:,} answers, "
        "by difficulty; words that nothing predicts count in the NLL above.\n\n"
        + _table(head, cells)
    )


def _model(recipe: Recipe, summary: dict[str, Any], index: DataIndex) -> list[tuple[str, str]]:
    config = recipe.model_config_for(index.vocab_size, index.eos_token_id, index.known_bos())
    layers = (
        f"{config.num_hidden_layers} unrolled: {config.num_prelude_layers} + "
        f"{config.num_recursions} x {config.num_recursion_layers} + {config.num_coda_layers}"
    )
    rows = [
        ("family, router", f"{config.family}, {config.router}"),
        ("unique parameters", f"{summary['parameters']:,}"),
        ("of these without embedding", f"{summary['non_embedding_parameters']:,}"),
        ("layers", layers),
        ("hidden, FFN", f"{config.hidden_size}, {config.intermediate_size}"),
        ("heads, key-value heads", f"{config.num_attention_heads}, {config.num_key_value_heads}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("longest sequence", f"{config.max_position_embeddings:,}"),
    ]
    if config.is_routed:
        shares = ", ".join(f"{share:.3g}" for share in config.router_capacities)
        rows += [("capacities", shares), ("update rule", config.update_rule)]
        rows += [("key-value sharing", config.kv_sharing)]
    return rows


def _training(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What it cost, on what, by which code; what is not known is left out."""
    forms = {
        "tokens": ("tokens", "{:,}"),
        "steps": ("steps", "{:,}"),
        "train_flops": ("training FLOPs, as planned", "{:.4g}"),
        "eval_nll": ("last validation NLL while training", "{:.4f}"),
        "wall_s": ("seconds", "{:,.0f}"),
        "tokens_per_s": ("tokens/s", "{:,.0f}"),
        "mfu": ("model FLOPs utilisation", "{:.1%}"),
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
    mixed = [f"{weight:g} x `{path}`" for path, weight in section.folders]
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


def _use() -> str:
    return """```python
import mor  # registers the architecture with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this card
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("Once", return_tensors="pt").input_ids
text = model.generate(ids, max_new_tokens=50, do_sample=True)
print(tokenizer.decode(text[0]))
```

`pip install .` in a checkout of `mixture-of-recursions` brings `mor`. Generation follows the causal
rule; `max_depth=1` caps the recursions of each token."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would end it, so it is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
