"""Tokenizers that begin texts in every way there is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

TEXTS = ["the king said to the queen", "thou art the crown of my lord", "naïve – 東京 🙂"]
BOS, EOS = 1, 2
KINDS = ("plain", "unused", "template", "llama", "framed", "twofold")
"""No BOS; one that is not used; added by a template, by a class; with EOS after; two tokens."""


@cache
def _rules() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    return str(bpe.to_str())


def bos_tokenizer(kind: str) -> Any:
    """One of `KINDS`; a fresh one each time."""
    rules = Tokenizer.from_str(_rules())
    named = {"eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "plain":
        return PreTrainedTokenizerFast(tokenizer_object=rules, **named)
    if kind == "llama":
        vocabulary = dict(sorted(rules.get_vocab().items(), key=lambda pair: pair[1]))
        return LlamaTokenizer(
            vocab=vocabulary, merges=[], add_bos_token=True, bos_token="<s>", **named
        )
    single = {"template": "<s> $A", "framed": "<s> $A </s>", "twofold": "<s> <unk> $A"}.get(kind)
    if single is not None:
        special = [("<unk>", 0), ("<s>", BOS), ("</s>", EOS)]
        rules.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=single, special_tokens=special),
            ]
        )
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", **named)


def save_bos_tokenizer(kind: str, folder: Path) -> Path:
    """Write one to a folder."""
    bos_tokenizer(kind).save_pretrained(folder)
    return folder
