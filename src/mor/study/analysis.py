"""Routing analysis: which tokens recurse, and whether it helped them, in one or more models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor.eval.evaluate import token_texts
from mor.eval.routes import Routes
from mor.eval.words import Place, can_tag, place_tokens
from mor.study.tables import Table

LEAST = 20
"""Tokens that a group needs to be listed."""


@dataclass(frozen=True)
class Analysed:
    """A model's routes with what its tokens are.

    Attributes:
        routes: of the sample.
        texts: [S][T] of the tokens.
        places: [S][T] part of word and of speech.
    """

    routes: Routes
    texts: list[list[str]]
    places: list[list[Place]]


def describe_tokens(routes: Routes, tokenizer: Any) -> Analysed:
    """Add texts and what they are. Each sequence is read as a text of its own."""
    texts = [token_texts(tokenizer, row.tolist()) for row in routes.ids]
    return Analysed(routes, texts, [place_tokens(row) for row in texts])


def groups_of(model: Analysed) -> dict[str, dict[str, np.ndarray]]:
    """Masks [S, T - 1] by name for each question: what kinds of tokens are there?"""
    routes = model.routes
    shape = routes.entropy.shape
    parts = np.array([[place.part for place in row] for row in model.places])[:, :-1]
    found = {"place in the word": _by_name(parts)}
    if can_tag():
        speech = [[place.speech or "other" for place in row] for row in model.places]
        found["part of speech"] = _by_name(np.array(speech)[:, :-1])
    edges = np.quantile(routes.entropy, [0.2, 0.4, 0.6, 0.8])
    fifth = np.searchsorted(edges, routes.entropy)
    limits = [0.0, *edges, float(routes.entropy.max())]
    fifths = found["entropy of the next token"] = {}
    for n in range(5):  # of a sure model several fifths look alike, and are one group
        name = f"{limits[n]:.1f}-{limits[n + 1]:.1f} nats"
        fifths[name] = fifths.get(name, np.zeros(shape, bool)) | (fifth == n)
    places = np.broadcast_to(np.arange(shape[1]), shape)
    quarter = np.minimum(3, places * 4 // max(1, shape[1]))
    names = ("first quarter", "second", "third", "last quarter")
    found["place in the sequence"] = {name: quarter == n for n, name in enumerate(names)}
    depths = routes.depths[:, :-1]
    found["recursions taken"] = {
        str(depth): depths == depth for depth in range(routes.recursions + 1)
    }
    return found


def _by_name(names: np.ndarray) -> dict[str, np.ndarray]:
    return {str(name): names == name for name in np.unique(names)}


def group_records(name: str, model: Analysed) -> list[dict[str, Any]]:
    """A JSON line for each kind of token with at least `LEAST` of them, the deepest first."""
    routes, records = model.routes, []
    depths, first, last = routes.depths[:, :-1], routes.hits[0], routes.hits[-1]
    for question, groups in groups_of(model).items():
        mine: list[dict[str, Any]] = []
        for group, mask in groups.items():
            count = int(mask.sum())
            if count < LEAST:
                continue
            mine.append(
                {
                    "model": name,
                    "question": question,
                    "group": group,
                    "tokens": count,
                    "share": count / mask.size,
                    "mean_depth": float(depths[mask].mean()),
                    "deepest": float((depths[mask] == routes.recursions).mean()),
                    "entropy": float(routes.entropy[mask].mean()),
                    "nll": float(routes.nll[-1][mask].mean()),
                    "gain": float((routes.nll[0] - routes.nll[-1])[mask].mean()),
                    "fixed": float((last & ~first)[mask].mean()),
                    "broke": float((first & ~last)[mask].mean()),
                }
            )
        if question in ("part of speech", "place in the word"):
            mine.sort(key=lambda record: record["mean_depth"], reverse=True)
        records += mine
    return records


def router_record(name: str, model: Analysed) -> dict[str, Any]:
    """A JSON line about the router as a whole."""
    return {"model": name, "question": "router", **model.routes.router_numbers()}


def group_tables(records: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each question, its models below each other."""
    several = len({record["model"] for record in records}) > 1
    heads = ["tokens", "of all", "depth", "deepest", "entropy", "NLL", "gain", "right", "spoiled"]
    tables: list[Table] = []
    for question in dict.fromkeys(r["question"] for r in records if "group" in r):
        rows = [
            [
                *([r["model"]] if several else []),
                r["group"],
                f"{100 * r['share']:z.1f}%",
                f"{r['mean_depth']:z.2f}",
                f"{100 * r['deepest']:z.1f}%",
                f"{r['entropy']:z.2f}",
                f"{r['nll']:z.3f}",
                f"{r['gain']:+z.3f}",
                f"{100 * r['fixed']:z.1f}%",
                f"{100 * r['broke']:z.1f}%",
            ]
            for r in records
            if r["question"] == question
        ]
        columns = ["model", *heads] if several else heads
        tables.append(Table(f"By {question}", columns, rows, _NOTE if not tables else ""))
    return tables


_NOTE = (
    "Depth: recursions of the token read; deepest: share that runs them all. Entropy and NLL "
    "(nats) are of the next token. Gain: nats that passes after the first save; right and spoiled: "
    "next tokens that were wrong after one pass and are right now, and the other way round."
)


def router_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each model."""
    names = {
        "mean_depth": "depth",
        "dead_positions": "dead positions",
        "max_vio": "MaxVio",
        "depth_entropy": "entropy",
        "depth_and_entropy": "with entropy",
        "depth_and_gain": "with gain",
    }
    rows = [
        [r["model"], *(f"{r[key]:z.3f}" for key in names)]
        for r in records
        if r["question"] == "router"
    ]
    note = (
        "Dead positions: share of positions where no sequence ran the deepest pass. Entropy (nats) "
        "is that of the depths. The last two are correlations of a token's depth."
    )
    return Table("Routers", ["model", *names.values()], rows, note)


def sample_passage(model: Analysed, length: int = 256) -> dict[str, Any]:
    """A passage in the middle of the sample: texts, depths and nats."""
    row, routes = len(model.texts) // 2, model.routes
    return {
        "tokens": model.texts[row][:length],
        "depths": routes.depths[row][:length].tolist(),
        "nll": [None, *routes.nll[-1][row][: length - 1].tolist()],
    }
