"""What ``mor compress`` found, for people: the card of the model and the report are one text."""

from __future__ import annotations

from typing import Any

import yaml

import mor
from mor.compress.settings import Settings


def report_text(
    settings: Settings, scores: dict[str, Any], trials: list[dict[str, Any]], chosen: dict[str, Any]
) -> str:
    """The card as Markdown under YAML front matter.

    Args:
        settings: what was asked for.
        scores: of the source and the result: weights, FLOPs per token, NLL.
        trials: every shape that was tried. chosen: the one that was trained.
    """
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["mixture-of-recursions", "compressed"]  # type: ignore[assignment]
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {settings.source}, compressed\n\nMade by `mor compress` {mor.__version__}; asked for: "
        f"{settings.goal}.",
        "## What it is and what was lost\n\n" + _comparison(scores),
        "## How it was chosen\n\n" + _trials(trials, chosen),
        "## Training\n\n"
        f"{settings.tokens:,.0f} tokens of `{scores['data']}`, the source as teacher, sequences of "
        f"{scores['seq_len']}, seed {settings.seed}. The source's licence and limits hold on; what "
        "this text does not measure (chat, knowledge, code) is likely to have lost more than its "
        "NLL shows.",
    ]
    return "\n\n".join(parts) + "\n"


def _comparison(scores: dict[str, Any]) -> str:
    source, result = scores["source"], scores["result"]
    lost = result["nll"] - source["nll"]
    start = scores["folded_nll"] - source["nll"]
    back = f"{1 - lost / start:z.0%}" if start > 0 else "all"
    rows = [
        "| | source | result | |",
        "|---|---:|---:|---:|",
        f"| weights | {source['weights']:,} | {result['weights']:,} | "
        f"{result['weights'] / source['weights']:.0%} |",
        f"| FLOPs per token | {source['flops']:.3g} | {result['flops']:.3g} | "
        f"1/{source['flops'] / result['flops']:.2f} |",
        f"| layers run | {source['layers_run']} | {result['layers_run']} | |",
        f"| NLL, nats per token | {source['nll']:.4f} | {result['nll']:.4f} | {lost:+z.4f} |",
    ]
    return (
        "\n".join(rows)
        + f"\n\nScored on {scores['sequences']} held-out sequences of {scores['seq_len']} tokens "
        f"of `{scores['data']}`, causal. Before training the folded model had NLL "
        f"{scores['folded_nll']:.4f}: training brought back {back} of what folding cost. FLOPs are "
        "counted, not timed; `mor bench serve` times both."
    )


def _trials(trials: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
    rows = [
        "| shape | without layers | weights | FLOPs per token | NLL untrained | after a trial | |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for trial in trials:
        name = trial["name"]
        if trial["block"]:
            name += ", layers before the gap run twice"
        rows.append(
            f"| {name} | {trial['gap'][0]}-{trial['gap'][1]} | {trial['weights']:,} | "
            f"{trial['flops']:.3g} | {trial['nll_before_training']:.4f} | "
            f"{trial['trial_nll']:.4f} | {'chosen' if trial['name'] == chosen['name'] else ''} |"
        )
    return "\n".join(rows)
