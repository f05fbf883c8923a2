"""What depth is worth, shown in seconds by a model that ships: formulas over cells."""

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
SOURCE, LENGTH = "task:formulas:documents=600,seed=1", 25
MODEL, CONTROL = "formulas", "formulas-three"


def show_depth_at_work(out: Path, console: Console) -> None:
    """Score the shipped model of formulas on new documents, beside its control.

    Args:
        out: folder for the documents.
        console: to print to.
    """
    prepare(SOURCE, out / "formulas", validation_fraction=0.5)
    dataset = PackedDataset(out / "formulas", "validation", LENGTH, loss_on="answers")
    model, control = load_model(MODEL), load_model(CONTROL)
    console.print(
        "The shipped model formulas works out a column of a spreadsheet: @1*@3 is the product of "
        "the cells one and three places back, modulo 5. How hard a cell is, is how many formulas "
        "stand one upon the other under it. It was trained by the recipe depth/formulas-propagate, "
        "not here; these documents are new to it.\n"
    )
    console.print(answer_table(score_answers(model, dataset)))
    score = score_answers(control, dataset)["causal"]
    shown = ", ".join(f"{level}: {share:z.0%}" for level, share in score["by_level"].items())
    console.print(
        "the same layers, trained with three passes for every token, to as many FLOPs: "
        f"{score['exact_match']:z.1%} of answers right; by difficulty {shown}\n"
    )
    tokens, depths = read_document(model, dataset)
    console.print("A document, each cell coloured by its passes:\n")
    console.print(render_terminal(tokens, depths, model.config.num_recursions))


def read_document(model: Any, dataset: PackedDataset) -> tuple[list[str], list[int]]:
    """The first document's tokens, blanks between them, and how many passes each one ran."""
    ids = dataset[0]["input_ids"][None]
    with torch.inference_mode():
        depths = model(ids, use_cache=False, routing="causal").depths[0].tolist()
    texts = token_texts(load_tokenizer(MODEL), ids[0].tolist())
    return [f"{text.strip()} " for text in texts], depths
