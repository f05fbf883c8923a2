"""LoRA on a trained model, on your own text: a stock Transformers Trainer, PEFT, one callback.

    mor data prepare my-texts --tokenizer runs/demo/threshold/model --out data/mine
    python examples/finetune_lora.py --model runs/demo/threshold/model --data data/mine --out tuned

Leaves ``tuned/adapter`` (small: LoRA matrices and the router) and ``tuned/merged`` (a model folder
for ``mor eval`` and ``from_pretrained``). Needs ``pip install -e '.[finetune]'``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from mor.data import PackedDataset
from mor.eval import evaluate
from mor.folder.tokenizer import load_tokenizer
from mor.hf.load import load_model
from mor.hf.modeling import MoRForCausalLM
from mor.train import RouterCallback


def nll(model: MoRForCausalLM, data: Path, seq_len: int) -> float:
    """Causal NLL in nats per token on up to 64 validation sequences."""
    dataset = PackedDataset(data, "validation", seq_len)
    return evaluate(model, dataset, max_sequences=64)["causal"]["nll"]


def main(words: list[str] | None = None) -> None:
    """Train, merge, save; print the NLL before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model or run folder")
    parser.add_argument("--data", type=Path, required=True, help="made by mor data prepare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args(words)

    model = load_model(options.model)
    before = nll(model, options.data, options.seq_len)
    # The shared block gets one adapter, which all recursions use. The router is trained along and
    # saved with its stored constants: the text is another, so its boundaries are, too.
    lora = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        modules_to_save=["router"],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=PackedDataset(options.data, "train", options.seq_len),
        callbacks=[RouterCallback()],
    )
    trainer.train()
    adapted.save_pretrained(options.out / "adapter")
    merged = adapted.merge_and_unload().eval()
    merged.save_pretrained(options.out / "merged")
    load_tokenizer(options.model).save_pretrained(options.out / "merged")
    after = nll(merged, options.data, options.seq_len)
    print(f"causal NLL before {before:.4f}, after {after:.4f}; written: {options.out}")


if __name__ == "__main__":
    main()
