"""A folder in which the commands of the pages find what they name, all of it tiny."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from mor.data import DataIndex, load_tokenizer, prepare
from mor.train import parse_recipe, train
from tests.tiny import WORDS, tiny_fields


def write_texts(folder: Path) -> None:
    """Forty documents of a hundred words."""
    folder.mkdir(parents=True)
    draw = random.Random(3)
    for number in range(40):
        text = " ".join(draw.choice(WORDS) for _ in range(100))
        (folder / f"{number:02d}.txt").write_text(f"Scene {number}. {text}.\n", encoding="utf-8")


def build_world(root: Path) -> Path:
    """Fill ``root``; the pages' commands run in copies of it."""
    before = Path.cwd()
    os.chdir(root)  # sources are recorded as they were named
    try:
        return fill(root)
    finally:
        os.chdir(before)


def fill(root: Path) -> Path:
    """Do it, in ``root``."""
    write_texts(root / "my-texts")
    shutil.copytree(root / "my-texts", root / "texts")
    (root / "held-out.txt").write_text((root / "texts" / "00.txt").read_text("utf-8") * 3)
    (root / "answers.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    prepare("texts", root / "data/shakespeare", vocab_size=300, validation_fraction=0.1)
    for name in ("data/fineweb-edu-dedup", "data/code", "data/maths", "runs/demo/data"):
        shutil.copytree(root / "data/shakespeare", root / name)
    fields = tiny_fields(root / "data/shakespeare", root / "runs", "threshold")
    fields["name"] = "threshold"
    fields["model"] |= {"max_position_embeddings": 512, "hidden_size": 32, "intermediate_size": 64}
    fields["train"] |= {"budget": {"steps": 2}, "save_steps": 1}
    run = train(parse_recipe(fields))
    for name in ("runs/demo/threshold", "runs/mor", "runs/uptrained"):
        shutil.copytree(run, root / name)
    fields["data"]["path"], fields["output"] = "data/shakespeare", "runs"
    (root / "my-recipe.yaml").write_text(yaml.safe_dump(fields), encoding="utf-8")
    tokenizer = load_tokenizer(DataIndex.load(root / "data/shakespeare").tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=30,  # as SmolLM2-135M, whose folds the pages describe
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
    )
    for name in ("path/to/llama", "path/to/checkpoint"):
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root
