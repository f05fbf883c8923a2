"""Supervised fine-tuning with TRL's SFTTrainer, on a local file of prompts or chats.

    python examples/sft.py --model runs/demo/threshold/model --data answers.jsonl --out tuned

A line of the file is ``{"prompt": ..., "completion": ...}`` (the loss is on the completion alone),
``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"text": ...}``. With ``--lora RANK``
only an adapter and the router are trained. Needs ``pip install -e '.[finetune]'``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from mor.data.bos import start_texts, text_start
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.train import RouterCallback

# For tokenizers that come without one: a line per turn.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def main(words: list[str] | None = None) -> None:
    """Train and save a model folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model or run folder")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank")
    parser.add_argument("--packing", action="store_true", help="several examples in a row")
    options = parser.parse_args(words)

    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    # A chat begins as every text of the model does, with its BOS if it has one.
    begin = start_texts(tokenizer, text_start(tokenizer, model.config))
    tokenizer.chat_template = tokenizer.chat_template or begin + CHAT_TEMPLATE
    dataset = load_dataset("json", data_files=str(options.data), split="train")
    lora = None
    if options.lora:
        lora = LoraConfig(
            r=options.lora,
            lora_alpha=2 * options.lora,
            target_modules="all-linear",
            modules_to_save=["router"],
            task_type="CAUSAL_LM",
        )
    arguments = SFTConfig(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        max_length=options.max_length,
        learning_rate=options.learning_rate,
        packing=options.packing,
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[RouterCallback()],
        peft_config=lora,
    )
    trainer.train()
    model = trainer.model.merge_and_unload() if lora else trainer.model
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss first {losses[0]:.4f}, last {losses[-1]:.4f}; written: {options.out / 'model'}")


if __name__ == "__main__":
    main()
