"""Tokenizers: train a byte-level BPE, or take one from a folder.

Byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes as in GPT-2)
has a token for each of the 256 bytes, so every text can be encoded and decodes to itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mor.errors import MorError, describe_missing

if TYPE_CHECKING:  # transformers takes seconds to import: only where a tokenizer is made or loaded
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
END_OF_TEXT_ID = 0  # of a tokenizer that is trained here
MIN_VOCAB_SIZE = 256 + 2  # every byte, end of text, padding


def check_vocab_size(vocab_size: int) -> None:
    """Raise `MorError` if a byte-level BPE cannot have this many tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise MorError(
            f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE} "
            f"(256 bytes, {END_OF_TEXT} and {PAD})"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with `vocab_size` tokens, or fewer where the text has too few pairs.

    `<|endoftext|>` (id 0) begins and ends documents, `<|pad|>` (id 1) pads. The same texts in the
    same order give the same tokenizer. Padding goes to the left, as batched generation needs.

    Raises:
        MorError: `vocab_size` is below 258.
    """
    check_vocab_size(vocab_size)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return wrap_rules(bpe)


def wrap_rules(rules: Tokenizer) -> PreTrainedTokenizerFast:
    """Hugging Face's tokenizer over rules that know `<|endoftext|>` and `<|pad|>`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=rules,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a Hugging Face tokenizer folder.

    Raises:
        MorError: the folder is missing, holds no tokenizer that can be read, or its tokenizer has
            no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MorError(f"tokenizer folder {path} {describe_missing(path)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises whatever a broken file happens to cause
        reason = (str(error).splitlines() or [type(error).__name__])[0].strip()
        raise MorError(
            f"{path} is not a Hugging Face tokenizer folder (expected tokenizer.json and "
            f"tokenizer_config.json): {reason}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise MorError(f"the tokenizer in {path} has no tokenizer.json; save its fast version")
    if tokenizer.eos_token_id is None:
        raise MorError(
            f"the tokenizer in {path} has no eos_token, which ends every document; "
            f"set it in tokenizer_config.json"
        )
    return tokenizer


def tokenizer_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest token id, so that an embedding of this many rows serves all."""
    return 1 + max(tokenizer.get_vocab().values())


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of what decides the tokens of a text: the rules, and which token is the end."""
    content = f"{tokenizer.eos_token_id}\n{tokenizer.backend_tokenizer.to_str()}"
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


class DocumentEncoder:
    """Turns the text of documents into token ids, with what begins and what ends each.

    It pickles as the tokenizer's rules, so that other processes can have one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, start: Sequence[int] = (), *, ended: bool = True
    ) -> None:
        """Copy the rules of `tokenizer`, which itself stays as it is.

        Args:
            tokenizer: any with a fast backend.
            start: ids that every document begins with (`mor.data.bos`).
            ended: whether the end-of-text token follows; without it a text is only begun.
        """
        end = (int(tokenizer.eos_token_id),) if ended else ()
        self.__setstate__((tokenizer.backend_tokenizer.to_str(), tuple(start), end))

    def __getstate__(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """The rules as JSON, and the ids before and after a text."""
        return self._rules.to_str(), self._start, self._end

    def __setstate__(self, state: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
        """Make the tokenizer from its rules."""
        rules = Tokenizer.from_str(state[0])
        rules.no_truncation()
        rules.no_padding()
        # A document that happens to spell out a special token must not gain a boundary by it.
        rules.encode_special_tokens = True
        self._rules, self._start, self._end = rules, state[1], state[2]

    def __call__(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Yield int64 `[start + num_tokens + end]` per text, in order."""
        for encoding in self._rules.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([*self._start, *encoding.ids, *self._end], dtype=np.int64)
