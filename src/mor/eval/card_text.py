"""What every model card says: for people and, in its front matter, for the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from mor.config import MoRConfig
from mor.data.tasks import TASKS
from mor.eval.answers import list_scores


def front(family: str, router: str, task: str = "text-generation") -> str:
    """The YAML that the Hub reads."""
    tags = ["mixture-of-recursions", family, f"router:{router}"]
    fields = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": tags,
    }
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---\n\n"


def kind_of(family: str, recursions: int) -> str:
    """What a model is, in half a sentence."""
    return {
        "vanilla": "A vanilla Transformer language model",
        "recursive": f"A recursive Transformer language model, {recursions} passes for every token",
        "mor": f"A Mixture-of-Recursions language model, 1 to {recursions} passes per token",
    }[family]


def score_section(scores: dict[str, Any]) -> str:
    """What is causal, what is not and says so, and what depth is worth."""
    rows = [("causal rule, as in generation", scores["causal"])]
    if scores["leaky"] is not None:
        rows.append(
            ("training's selection: **looks ahead, no measure of the model**", scores["leaky"])
        )
    cells = [
        (
            rule,
            f"{score['nll']:z.4f}",
            f"{score['perplexity']:z.2f}",
            f"{score['bits_per_byte']:z.4f}",
            f"{score['mean_depth']:z.2f}",
        )
        for rule, score in rows
    ]
    if (chance := scores.get("random_routes_nll")) is not None:
        depth = f"{scores['causal']['mean_depth']:z.2f}"
        cells.append(("the same depths, dealt out by chance", f"{chance:z.4f}", "", "", depth))
    for cap in scores["depth_cap"] if len(scores["depth_cap"]) > 1 else ():
        name = f"causal rule, at most {cap['max_depth']} of {len(scores['depth_cap'])} recursions"
        cells.append((name, f"{cap['nll']:z.4f}", "", "", f"{cap['mean_depth']:z.2f}"))
    head = ("rule", "NLL (nats/token)", "perplexity", "bits/byte", "mean depth")
    return (
        f"The first {scores['sequences']:,} sequences of {scores['seq_len']:,} tokens of split "
        f"`{scores['split']}`, {scores['tokens']:,} targets. A small sample: `mor eval` scores all "
        "of it.\n\n" + table(head, cells) + _answers(scores.get("answers"))
    )


def _answers(answers: dict[str, Any] | None) -> str:
    """Exact match of a task by difficulty; nothing for text, whose NLL above is the measure."""
    if answers is None:
        return ""
    levels = list(answers["causal"]["by_level"])
    cells = [
        (
            name,
            f"{score['exact_match']:z.1%}",
            *(f"{score['by_level'][level]:z.1%}" for level in levels),
            f"{score['mean_depth']:z.2f}",
        )
        for name, score in list_scores(answers)
    ]
    head = ("exact match of answers", "all", *(f"{level}" for level in levels), "mean depth")
    hidden = TASKS[answers["task"]["name"]].hidden
    counted = "words that nothing predicts count in the NLL above"
    if hidden:
        counted = "the NLL above is of these answers"
    return (
        f"\n\nThe measure of this task is the exact match of its {answers['queries']:,} answers, "
        f"by difficulty; {counted}.\n\n" + table(head, cells)
    )


def model_rows(config: MoRConfig, total: int, inner: int) -> list[tuple[str, str]]:
    """What the network is.

    Args:
        config: the model's.
        total: unique parameters. inner: of these without embedding.
    """
    layers = (
        f"{config.num_hidden_layers} unrolled: {config.num_prelude_layers} + "
        f"{config.num_recursions} x {config.num_recursion_layers} + {config.num_coda_layers}"
    )
    rows = [
        ("family, router", f"{config.family}, {config.router}"),
        ("unique parameters", f"{total:,}"),
        ("of these without embedding", f"{inner:,}"),
        ("layers", layers),
        ("hidden, FFN", f"{config.hidden_size}, {config.intermediate_size}"),
        ("heads, key-value heads", f"{config.num_attention_heads}, {config.num_key_value_heads}"),
        _reads(config),
        ("longest sequence", f"{config.max_position_embeddings:,}"),
    ]
    if config.is_routed:
        shares = ", ".join(f"{share:z.3g}" for share in config.router_capacities)
        rows += [("capacities", shares), ("update rule", config.update_rule)]
        rows += [("key-value sharing", config.kv_sharing)]
    return rows


def _reads(config: MoRConfig) -> tuple[str, str]:
    """What its tokens are made of."""
    if config.modality == "image":
        tall, wide = config.patch_shape
        return "tokens", f"{config.num_patches} patches of {tall} x {wide} pixels"
    if config.modality == "audio":
        step = config.frames_per_token
        return "tokens", f"{step} frames each, of {config.num_mel_bins} numbers"
    return "vocabulary", f"{config.vocab_size:,}"


def use_section() -> str:
    """How to load it."""
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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell would end it, so it is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
