"""The model card of a run on images or sounds."""

from __future__ import annotations

from typing import Any

import yaml

import mor
from mor.config import MoRConfig
from mor.data.media import MediaIndex
from mor.eval.card_text import front, model_rows, table

_TASKS = {
    "image": "image-classification",
    "audio": "audio-classification",
    "text": "image-text-to-text",
}


def media_card_text(
    recipe: Any,
    summary: dict[str, Any],
    scores: dict[str, Any],
    config: MoRConfig,
    index: MediaIndex,
    training: list[tuple[str, str]],
) -> str:
    """The card as Markdown under YAML front matter.

    Args:
        recipe: of the run. summary: its ``summary.json``.
        scores: of :func:`mor.eval.examples.evaluate_examples`.
        config: of the model. index: of the data.
        training: rows of what the training cost.
    """
    total, inner = summary["parameters"], summary["non_embedding_parameters"]
    hears = config.audio_token_id is not None
    task = "audio-text-to-text" if hears else _TASKS[config.modality]
    kinds = {"image": "A classifier of images", "audio": "A classifier of sounds"}
    text = f"A model of text that {'hears recordings' if hears else 'reads pictures'}"
    what = kinds.get(config.modality, text)
    data = [
        ("folder", f"`{index.directory}`"),
        ("source", f"`{index.source}`"),
        ("licence of the source", index.licence or "not said"),
        ("classes", ", ".join(index.classes)),
        *((f"examples of `{name}`", f"{split.examples:,}") for name, split in index.splits.items()),
    ]
    # Transformers has no pipeline for a model of text that hears.
    use = (
        "`mor serve FOLDER`, and parts of type `input_audio` in chats."
        if hears
        else (
            "```python\nimport mor  # registers the model\nfrom transformers import pipeline\n\n"
            f'classify = pipeline("{task}", model="FOLDER")\n```'
        )
    )
    sections = [
        front(summary["family"], summary["router"], task)
        + f"# {summary['name']}\n\n{what}, 1 to {config.num_recursions} passes per "
        f"token, trained with `mor` {mor.__version__}.",
        "## Scores\n\n" + _scores(scores),
        "## Model\n\n" + table(("", "value"), model_rows(config, total, inner)),
        "## Training\n\n" + table(("", "value"), training),
        "## Data\n\n" + table(("", "value"), data),
        "## Use\n\n" + use,
        "## Recipe\n\nEvery default written out; `mor train recipe.yaml` runs it again.\n\n"
        "```yaml\n" + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False) + "```",
        "## Left to the author\n\nLicence, intended use, limits, and what is in the data that "
        "should be known. Nothing about them follows from a training run.",
    ]
    return "\n\n".join(sections) + "\n"


def _scores(scores: dict[str, Any]) -> str:
    captions = scores["kind"] == "captions"
    unit = "token" if captions else "example"
    rows = [
        ("exact answers, greedy" if captions else "each token by itself", scores["causal"]),
        ("top-k of the example", scores["topk"]),
        ("the same depths, dealt out by chance", scores["random_routes"]),
    ]
    rows += [(f"at most {row['max_depth']} passes", row) for row in scores["depth_cap"]]
    cells = [
        (
            name,
            f"{score['accuracy']:z.2%}",
            f"{score['nll']:z.4f}",
            f"{score['mean_depth']:z.2f}",
            f"{score['flops_per_example']:.4g}",
        )
        for name, score in rows
        if score is not None
    ]
    return (
        f"{scores['examples']:,} examples of split `{scores['split']}`; `mor eval` scores all of "
        f"it.\n\n" + table(("rule", "accuracy", f"NLL (nats/{unit})", "mean depth", "FLOPs"), cells)
    )
