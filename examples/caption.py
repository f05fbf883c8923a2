"""Train a small model that says what is in a picture, with Transformers' Trainer.

    mor data prepare digits --out data/digits
    python examples/caption.py --data data/digits --out runs/captions

``mor train image/captions-threshold`` does the same by mor's own loop. Pictures are two images of
the folder side by side, or one beside nothing (:mod:`mor.data.media.pairs`): the caption needs both
classes and their order, and a question may ask for one side. Exact answers on the folder's test
images are printed for every cap on depth. The model folder serves: ``mor serve
runs/captions/model``. Needs ``pip install -e '.[media]'``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from mor import MoRConfig, MoRForConditionalGeneration
from mor.data.media import IMAGES, MediaDataset, MediaIndex
from mor.eval.captions import evaluate_captions
from mor.hf.captions import IMAGE, caption_processor, caption_tokenizer
from mor.train import RouterCallback
from mor.train.classify.captions import CaptionSamples


def main(words: list[str] | None = None) -> None:
    """Train, score, and save a model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a prepared folder of images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--router", default="threshold")
    parser.add_argument("--patch-size", type=int, nargs=2, default=[1, 8], help="height and width")
    parser.add_argument("--test-samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)

    torch.manual_seed(options.seed)
    images = MediaDataset(options.data, "train")
    if images.index.kind != IMAGES:
        parser.error(f"--data {options.data} holds {images.index.kind}, not images")
    config = make_config(images.index, options)
    model = MoRForConditionalGeneration(config)
    train = CaptionSamples(images, config, seed=options.seed)
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
        train_dataset=train.take(options.steps * options.batch_size),
        data_collator=default_data_collator,
        callbacks=[RouterCallback()],
    )
    trainer.train()
    processor = caption_processor(images.index, config)
    model.eval()
    model.save_pretrained(options.out / "model")
    processor.save_pretrained(options.out / "model")
    test = MediaDataset(options.data, "test")
    scores = evaluate_captions(model, processor, test, samples=options.test_samples)
    for row in scores["depth_cap"]:
        print(json.dumps(row))
    (options.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def make_config(index: MediaIndex, options: argparse.Namespace) -> MoRConfig:
    """One private layer at each end, and one that is applied up to three times between."""
    tokenizer = caption_tokenizer(index)
    height, width, channels = index.shape
    return MoRConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        sharing="middle_cycle",
        num_recursions=3,
        num_recursion_layers=1,
        router=options.router,
        update_rule="last",
        max_position_embeddings=256,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_size=[height, 2 * width],
        patch_size=options.patch_size,
        num_channels=channels,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


if __name__ == "__main__":
    main()
