"""Formulas over earlier cells: values and levels against a plain reading of the words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mor.data import DataIndex, PackedDataset, prepare
from mor.data.tasks import open_task, read_marks, task_tokenizer
from mor.data.tasks.formulas import Formulas
from mor.errors import MorError
from mor.eval import evaluate
from tests.strategies import make_model, small_config


def work_out(words: list[str], modulus: int) -> tuple[list[int], list[int]]:
    """Values and levels of cells, one by one, as a reader would."""
    values: list[int] = []
    levels: list[int] = []
    for word in words:
        if word.isdigit():
            values.append(int(word))
            levels.append(0)
            continue
        cells = [int(name) for name in word.replace("+", "").replace("*", "").split("@")[1:]]
        assert all(1 <= back <= len(values) for back in cells)
        given = [values[-back] for back in cells]
        result = given[0] * given[1] if "*" in word else sum(given)
        values.append(result % modulus)
        levels.append(1 + max(levels[-back] for back in cells))
    return values, levels


SHAPES = st.fixed_dictionaries(
    {
        "cells": st.integers(3, 40),
        "numbers": st.integers(1, 2),
        "modulus": st.integers(2, 12),
        "reach": st.integers(1, 9),
        "levels_up_to": st.integers(1, 9),
        "skew": st.sampled_from([0.0, 0.5, 2.0]),
        "copies": st.sampled_from([0.0, 0.3, 1.0]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=60, deadline=None)
@given(fields=SHAPES, pad=st.integers(0, 3))
def test_solved_rows_are_as_worked_out_by_hand(fields: dict[str, float], pad: int) -> None:
    task = Formulas(**fields)  # type: ignore[arg-type]
    task.check()
    vocabulary = task_tokenizer(task).get_vocab()
    first = vocabulary["0"]
    documents = [task.text(number).split() for number in range(4)]
    # Two documents a row with the end of text between them, and places without a word at the end.
    rows = np.zeros((2, 2 * task.cells + 1 + pad), dtype=np.int64)
    for row, pair in enumerate((documents[:2], documents[2:])):
        for at, words in zip((0, task.cells + 1), pair, strict=True):
            rows[row, at : at + task.cells] = [vocabulary[word] for word in words]
    found = task.solve(rows, first)
    for row, pair in enumerate((documents[:2], documents[2:])):
        for at, words in zip((0, task.cells + 1), pair, strict=True):
            values, levels = work_out(words, task.modulus)
            here = slice(at, at + task.cells)
            formulas = [not word.isdigit() for word in words]
            assert found.asked[row, here].tolist() == formulas
            assert found.levels[row, here].tolist() == levels
            answers = found.answers[row, here][formulas] - first
            assert answers.tolist() == [v for v, f in zip(values, formulas, strict=True) if f]
            assert max(levels) <= task.levels_up_to
        assert not found.asked[row, task.cells]
        assert not found.asked[row, 2 * task.cells + 1 :].any()


def test_a_formula_cut_off_from_its_cells_has_no_answer() -> None:
    task = open_task("task:formulas:cells=6,numbers=2,reach=4")
    vocabulary = task_tokenizer(task).get_vocab()
    # The second cell names one before the row; what builds on that cell has no answer either.
    row = np.array([[vocabulary[word] for word in ("3", "@2+@1", "@1", "@3*@3")]])
    found = task.solve(row, vocabulary["0"])
    assert found.asked.tolist() == [[False, False, False, True]]
    assert found.answers[0, 3] == vocabulary["4"]  # 9 modulo 5
    # A document that ended in the row is none of the next one's cells.
    row = np.array([[vocabulary["3"], 0, vocabulary["@2"], vocabulary["@3"]]])
    assert not task.solve(row, vocabulary["0"]).asked.any()


def test_every_level_is_met_and_documents_stay_the_same() -> None:
    task = open_task("task:formulas")
    texts = [task.text(number) for number in range(300)]
    assert len(set(texts)) == 300
    assert texts[7] == open_task("task:formulas").text(7)
    levels = np.concatenate([work_out(text.split(), task.modulus)[1] for text in texts])
    shares = np.bincount(levels) / len(levels)
    assert len(shares) == task.levels_up_to + 1
    assert shares[0] == pytest.approx(task.numbers / task.cells)
    assert shares.min() > 0.002
    copies = [word for text in texts for word in text.split() if word.count("@") == 1]
    pairs = [word for text in texts for word in text.split() if word.count("@") == 2]
    assert abs(len(copies) / (len(copies) + len(pairs)) - task.copies) < 0.02
    assert abs(sum("+" in word for word in pairs) / len(pairs) - 0.5) < 0.03


def test_prepared_formulas_have_values_as_labels(tmp_path: Path) -> None:
    source = "task:formulas:documents=200,cells=9,modulus=7"
    prepare(source, tmp_path / "data", validation_fraction=0.2)
    tokenizer = task_tokenizer(open_task(source))
    index = DataIndex.load(tmp_path / "data")
    assert index.document_length() == 10
    dataset = PackedDataset(tmp_path / "data", "train", 10, loss_on="answers")
    for place in range(20):
        ids, labels = dataset[place]["input_ids"], dataset[place]["labels"]
        words = tokenizer.convert_ids_to_tokens(ids.tolist())[:9]
        values, _ = work_out(words, 7)
        wanted = [-100, *(tokenizer.convert_tokens_to_ids(str(value)) for value in values)]
        wanted[1:] = [w if "@" in word else -100 for w, word in zip(wanted[1:], words, strict=True)]
        assert labels.tolist() == wanted
    # Cells predict nothing else, whatever the loss is asked to be on.
    everything = PackedDataset(tmp_path / "data", "train", 10)
    assert torch.equal(everything[7]["labels"], dataset[7]["labels"])
    # A batch is as its rows alone.
    rows = dataset.__getitems__([3, 1, 4])
    assert all(torch.equal(rows[1][name], dataset[1][name]) for name in rows[1])


def test_settings_of_another_version_are_refused() -> None:
    stored = open_task("task:formulas").marks({"0": 2})
    assert read_marks(stored).settings["cells"] == 24
    with pytest.raises(MorError, match="has no field 'colour'"):
        read_marks(stored | {"colour": "red"})


def test_scores_are_of_the_values(tmp_path: Path) -> None:
    prepare("task:formulas:documents=60,cells=9", tmp_path / "data", validation_fraction=0.5)
    dataset = PackedDataset(tmp_path / "data", "validation", 10)
    config = small_config("threshold", vocab_size=dataset.index.vocab_size, update_rule="last")
    model = make_model(config)
    found = evaluate(model, dataset)
    rows = torch.stack([dataset[place]["input_ids"] for place in range(len(dataset))])
    labelled = PackedDataset(tmp_path / "data", "validation", 10, loss_on="answers")
    labels = torch.stack([labelled[place]["labels"] for place in range(len(dataset))])[:, 1:]
    told = labels != -100
    with torch.no_grad():
        logits = model(rows, use_cache=False, routing="causal").logits[:, :-1][told]
    nll = torch.nn.functional.cross_entropy(logits, labels[told])
    assert found["causal"]["nll"] == pytest.approx(float(nll), rel=1e-5)
    assert found["tokens"] == int(told.sum()) == found["answers"]["queries"]
    right = float((logits.argmax(-1) == labels[told]).double().mean())
    assert found["answers"]["causal"]["exact_match"] == pytest.approx(right)
    assert found["passes"][-1]["accuracy"] == pytest.approx(right)
    assert found["random_routes_nll"] != found["causal"]["nll"]
