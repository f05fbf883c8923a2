"""Train a small model that says what is in a picture, with Transformers' Trainer.

    mor data prepare digits --out data/digits
    python examples/caption.py --data data/digits --out runs/captions

Pictures are two images of the folder side by side, or one beside nothing
(:mod:`mor.data.media.pairs`): the caption needs both classes and their order, and a question may
ask for one side. Exact answers on the folder's test images are printed for every cap on depth. The
model folder serves: ``mor serve runs/captions/model``. Needs ``pip install -e '.[media]'``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mor import MoRConfig, MoRForConditionalGeneration, MoRProcessor
from mor.data.media import MediaDataset
from mor.data.media.pairs import SIDES, CaptionedPairs, Pair, ask, caption
from mor.data.tokenizer import train_tokenizer
from mor.hf.grey import MoRImageProcessor
from mor.train import RouterCallback

IMAGE = "<image>"
# A turn is what was said; an answer ends with the end of text.
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    "{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def main(words: list[str] | None = None) -> None:
    """Train, score, and save a model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder of grey images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--router", default="threshold")
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--test-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)

    torch.manual_seed(options.seed)
    train = CaptionedPairs(
        MediaDataset(options.data, "train"), options.steps * options.batch_size, seed=options.seed
    )
    processor = make_processor(train, options.patch_size)
    model = MoRForConditionalGeneration(make_config(processor, options))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=options.seed,
        ),
        train_dataset=train,
        data_collator=lambda pairs: make_batch(pairs, processor),
        callbacks=[RouterCallback()],
    )
    trainer.train()
    model.eval()
    model.save_pretrained(options.out / "model")
    processor.save_pretrained(options.out / "model")
    test = CaptionedPairs(
        MediaDataset(options.data, "test"), options.test_samples, seed=options.seed + 1
    )
    scores = [
        score(model, processor, test, cap) for cap in range(1, model.config.num_recursions + 1)
    ]
    for row in scores:
        print(json.dumps(row))
    (options.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def make_processor(train: CaptionedPairs, patch_size: int) -> MoRProcessor:
    """The image processor of these pictures, and a tokenizer of what is said about them."""
    names: list[str | None] = [*train.names, None]
    said = [caption({"left": a, "right": b}) for a in names for b in names if a or b]
    tokenizer = train_tokenizer([*said, *map(ask, SIDES)], 340)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = TEMPLATE
    height, width = train[0].pixels.shape[:2]
    grey = MoRImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.5], image_std=[0.5]
    )
    patches = (height // patch_size) * (width // patch_size)
    return MoRProcessor(grey, tokenizer, num_image_tokens=patches, image_token=IMAGE)


def make_config(processor: MoRProcessor, options: argparse.Namespace) -> MoRConfig:
    """One private layer at each end, and one that is applied up to three times between."""
    tokenizer, size = processor.tokenizer, processor.image_processor.size
    return MoRConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        sharing="middle_cycle",
        num_recursions=3,
        num_recursion_layers=1,
        router=options.router,
        max_position_embeddings=256,
        image_token_id=processor.image_token_id,
        image_size=[size["height"], size["width"]],
        patch_size=options.patch_size,
        num_channels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def make_batch(pairs: list[Pair], processor: MoRProcessor) -> dict[str, Tensor]:
    """Rows of picture, question, answer, end; the loss is on the answer alone."""
    tokenizer = processor.tokenizer
    heads = [ids_of_question(pair, processor) for pair in pairs]
    tails = [
        [*tokenizer(pair.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for pair in pairs
    ]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for head, tail in zip(heads, tails, strict=True):
        spare = longest - len(head) - len(tail)
        batch["input_ids"].append([*head, *tail, *[tokenizer.pad_token_id] * spare])
        batch["attention_mask"].append([1] * (longest - spare) + [0] * spare)
        batch["labels"].append([-100] * len(head) + tail + [-100] * spare)
    tensors = {name: torch.tensor(rows) for name, rows in batch.items()}
    return tensors | {"pixel_values": pixels_of(pairs, processor)}


def ids_of_question(pair: Pair, processor: MoRProcessor) -> list[int]:
    """Token ids of the picture's places and the question, as the chat template lays them."""
    ids: list[int] = processor.tokenizer(pair.question, add_special_tokens=False).input_ids
    return [processor.image_token_id] * processor.num_image_tokens + ids


def pixels_of(pairs: list[Pair], processor: MoRProcessor) -> Tensor:
    """[B, 1, H, W] as the model takes them."""
    images = [pair.pixels.numpy() for pair in pairs]
    found: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    return found


def score(
    model: MoRForConditionalGeneration, processor: MoRProcessor, test: CaptionedPairs, cap: int
) -> dict[str, Any]:
    """Share of exact answers with depth capped: captions, answers for one side, and all of them."""
    right: dict[str, list[bool]] = {"captions": [], "questions": []}
    groups: dict[int, list[Pair]] = {}
    for pair in (test[number] for number in range(len(test))):
        groups.setdefault(len(ids_of_question(pair, processor)), []).append(pair)
    for pairs in groups.values():  # of one length, so that nothing is padded
        ids = torch.tensor([ids_of_question(pair, processor) for pair in pairs])
        generate: Any = model.generate
        written = generate(
            input_ids=ids, pixel_values=pixels_of(pairs, processor), max_new_tokens=24,
            do_sample=False, max_depth=cap, attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        texts = processor.tokenizer.batch_decode(written[:, ids.shape[1] :], True)
        for pair, text in zip(pairs, texts, strict=True):
            right["questions" if pair.question else "captions"].append(text == pair.answer)
    every = [one for kind in right.values() for one in kind]
    shares = {name: sum(kind) / max(1, len(kind)) for name, kind in right.items()}
    return {"max_depth": cap, "exact": sum(every) / len(every), **shares, "samples": len(every)}


if __name__ == "__main__":
    main()
