"""What depth is worth, shown in seconds by the model that ships: hops through a map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mor.cli.evaluate import answer_table
from mor.data import PackedDataset, prepare
from mor.eval.answers import score_answers
from mor.eval.evaluate import token_texts
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.report import render_terminal

# Another seed than the recipes': no document of these was trained on.
SOURCE, LENGTH = "task:hops:documents=600,seed=1", 25
MODEL, DENSE = "hops", "hops-dense"


def show_depth_at_work(out: Path, console: Console) -> None:
    """Score the shipped chain-follower on new documents, beside its dense twin.

    Args:
        out: folder for the documents.
        console: to print to.
    """
    prepare(SOURCE, out / "hops", validation_fraction=0.5)
    dataset = PackedDataset(out / "hops", "validation", LENGTH, loss_on="answers")
    model, dense = load_model(MODEL), load_model(DENSE)
    console.print(
        "The shipped model hops follows k steps through a map given in the context. It was trained "
        "by the recipes depth/hops-*, not here; these documents are new to it.\n"
    )
    console.print(answer_table(score_answers(model, dataset)))
    score = score_answers(dense, dataset)["causal"]
    shown = ", ".join(f"{level}: {share:z.0%}" for level, share in score["by_level"].items())
    console.print(
        f"dense twin (one pass, {sum(p.numel() for p in dense.parameters()):,} weights, as many "
        f"tokens as the recursive trunk): {score['exact_match']:z.1%} of answers right; "
        f"by hops {shown}\n"
    )
    tokens, depths = read_document(model, dataset)
    console.print("A document, each token coloured by its passes; s3^5 asks where 5 steps lead:\n")
    console.print(render_terminal(tokens, depths, model.config.num_recursions))


def read_document(model: Any, dataset: PackedDataset) -> tuple[list[str], list[int]]:
    """The first document's tokens, blanks between them, and how many passes each one ran."""
    ids = dataset[0]["input_ids"][None]
    with torch.inference_mode():
        depths = model(ids, use_cache=False, routing="causal").depths[0].tolist()
    texts = token_texts(load_tokenizer(MODEL), ids[0].tolist())
    return [f"{text.strip()} " for text in texts], depths
