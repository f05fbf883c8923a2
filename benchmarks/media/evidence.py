"""Accuracy of images and sounds for every way of spending depth, as lines and as a table.

    mor data prepare digits --out data/digits
    mor data prepare japanese-vowels --out data/japanese-vowels
    mor data prepare animal-mnist --out data/animal-mnist
    python benchmarks/media/evidence.py run image/digits --seeds 0 1 2
    python benchmarks/media/evidence.py run audio/vowels --seeds 0 1 2
    python benchmarks/media/evidence.py run image/animals --seeds 0
    python benchmarks/media/evidence.py run image/captions --seeds 0
    python benchmarks/media/evidence.py table image/digits

``run`` trains the recipes ``FAMILY-*`` that come with mor, one after the other in one process, and
evaluates each on the test split; a line of every finished run is appended to ``--records``
(``runs/bench/media.jsonl``; ``benchmarks/results/media.jsonl`` comes with the code). A run that has
its line already is left out, so that a stopped command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from mor.data.media import MediaDataset
from mor.disk import append_jsonl
from mor.errors import MorError
from mor.eval.captions import evaluate_captions
from mor.eval.examples import evaluate_examples
from mor.hf.load import load_media_model, load_model
from mor.hf.load_media import load_processor
from mor.provenance import provenance
from mor.recipes import builtin_recipes
from mor.run_files import SUMMARY
from mor.train import load_recipe, train

ROWS = ("vanilla", "recursive", "expert", "threshold", "two", "random", "dense")
KEPT = ("name", "family", "router", "parameters", "tokens", "steps", "train_flops", "seed")
CAPS = ("max_depth", "accuracy", "mean_depth", "flops_per_example", "recursion_flops_per_example")
RECORDS = Path("runs/bench/media.jsonl")


def run(
    family: str, seeds: list[int], records: Path, overrides: list[str], rows: list[str]
) -> None:
    """Train and evaluate what has no line yet; all rows where none is named."""
    there = {(line["family"], line["row"], line["seed"]) for line in read(records)}
    for seed in seeds:
        for row in rows or rows_of(family):
            if (family, row, seed) not in there:
                append_jsonl(records, run_one(family, row, seed, overrides))


def run_one(family: str, row: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """The line of one run."""
    name = f"{family.rsplit('/')[-1]}-{row}-seed-{seed}"
    given = [f"train.seed={seed}", f"name={name}", "train.report_to=[]", *overrides]
    recipe = load_recipe(f"{family}-{row}", given)
    folder, data = recipe.run_dir, recipe.data.path
    assert data is not None
    if not (folder / SUMMARY).is_file():
        train(recipe, resume=folder.exists())
    test = MediaDataset(data, "test")
    if recipe.data.kind == "captions":
        model: Any = load_model(folder)
        result = evaluate_captions(model, load_processor(folder), test, batch_size=64)
    else:
        result = evaluate_examples(load_media_model(folder), test, batch_size=64)
    summary = json.loads((folder / SUMMARY).read_text("utf-8"))
    line = {"family": family, "row": row, "seed": seed}
    line |= {"run": {key: summary.get(key) for key in KEPT}}
    line |= {key: result[key] for key in ("rule", "examples", "causal", "topk", "random_routes")}
    line["depth_cap"] = [{key: cap[key] for key in CAPS} for cap in result["depth_cap"]]
    line["hard_examples"] = result["hard_examples"]
    print(f"{name}: {score_of(line)['accuracy']:.2%}", flush=True)
    return line | provenance(None)


def rows_of(family: str) -> list[str]:
    """The rows that have a recipe. Raises `MorError` where there is none."""
    found = [row for row in ROWS if f"{family}-{row}" in builtin_recipes()]
    if not found:
        raise MorError(f"family={family!r} has no recipes such as {family}-recursive")
    return found


def read(records: Path) -> list[dict[str, Any]]:
    """The lines there are."""
    if not records.is_file():
        return []
    return [json.loads(line) for line in records.read_text("utf-8").splitlines() if line]


def score_of(line: dict[str, Any]) -> dict[str, Any]:
    """The score under the rule that the model follows."""
    score: dict[str, Any] = line[line["rule"]] if line["rule"] == "topk" else line["causal"]
    return score


def print_table(family: str, lines: list[dict[str, Any]]) -> None:
    """Mean and spread over seeds, as Markdown."""
    lines = [line for line in lines if line["family"] == family]
    full = [
        score_of(one)["recursion_flops_per_example"] for one in lines if one["row"] == "recursive"
    ]
    print(
        "| run | accuracy, % | by seed | each token by itself | depths by chance | mean depth "
        "| recursion FLOPs | FLOPs of an example | weights | training FLOPs |"
    )
    print("|---|" + "---:|" * 9)
    for row in ROWS:
        own = sorted((one for one in lines if one["row"] == row), key=lambda one: one["seed"])
        if not own:
            continue
        scores = [score_of(one) for one in own]
        percent = [100 * score["accuracy"] for score in scores]
        share = scores[0]["recursion_flops_per_example"] / full[0] if full else float("nan")
        routed = own[0]["random_routes"] is not None
        cells = [
            row,
            f"{statistics.mean(percent):.2f}",
            ", ".join(f"{one:.2f}" for one in percent),
            f"{mean_of(own, 'causal'):.2f}" if routed else "",
            f"{mean_of(own, 'random_routes'):.2f}" if routed else "",
            f"{statistics.mean(score['mean_depth'] for score in scores):.2f}",
            f"{share:.0%}",
            f"{scores[0]['flops_per_example']:.3g}",
            f"{own[0]['run']['parameters']:,}",
            f"{own[0]['run']['train_flops']:.2g}",
        ]
        print(f"| {' | '.join(cells)} |")
    print("\n| run | at most | accuracy, % |\n|---|---:|---:|")
    for row in ROWS:
        own = [one for one in lines if one["row"] == row and len(one["depth_cap"]) > 1]
        for place in range(len(own[0]["depth_cap"]) if own else 0):
            found = [100 * one["depth_cap"][place]["accuracy"] for one in own]
            print(f"| {row} | {place + 1} | {statistics.mean(found):.2f} |")


def mean_of(lines: list[dict[str, Any]], name: str) -> float:
    """Mean accuracy in percent of one of the scores."""
    return statistics.mean(100 * line[name]["accuracy"] for line in lines if line[name])


def main() -> None:
    """`run FAMILY --seeds 0 1 2`, `table FAMILY`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("family", help="image/digits, image/captions, audio/vowels, ...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--rows", nargs="+", default=[], choices=ROWS, help="default: all")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    given = parser.parse_args()
    if given.verb == "run":
        run(given.family, given.seeds, given.records, given.overrides, given.rows)
    print_table(given.family, read(given.records))


if __name__ == "__main__":
    main()
