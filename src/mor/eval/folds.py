"""What folding costs before any training: NLL of a held-out text per sharing, R, start and rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor.config import MoRConfig
from mor.data.bos import text_start
from mor.data.tokenizer import DocumentEncoder
from mor.errors import MorError
from mor.eval.passes import run_pass
from mor.hf.fold.fold import fold
from mor.hf.fold.plan import Folding
from mor.hf.modeling import MoRForCausalLM


@dataclass(frozen=True)
class FoldRow:
    """One model of the table.

    Attributes:
        folding: how it was folded; None for the source itself.
        nll: nats per token.
        parameters: unique ones, embedding and head included.
        layers: unrolled.
    """

    folding: Folding | None
    nll: float
    parameters: int
    layers: int


def text_sequences(
    path: Path,
    tokenizer: Any,
    seq_len: int,
    max_tokens: int | None,
    config: MoRConfig | None = None,
) -> list[dict[str, Tensor]]:
    """A text file as sequences of ``seq_len`` tokens, the rest left out.

    The file is one document, begun as in training: the first sequence has the model's BOS, if it
    uses one, and the others go on in the middle, as training's sequences do.

    Args:
        path: the file.
        tokenizer: of the model.
        seq_len: tokens of a sequence.
        max_tokens: how many to look at; None for all.
        config: of the model; None: texts begin as the tokenizer does it.

    Raises:
        MorError: it cannot be read, or is shorter than one sequence.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MorError(f"{path} cannot be read as UTF-8 text: {error}") from None
    start = text_start(tokenizer, config)
    if getattr(tokenizer, "is_fast", False):
        ids = next(DocumentEncoder(tokenizer, start, ended=False)([text])).tolist()[:max_tokens]
    else:
        plain = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [*start, *plain][:max_tokens]
    count = len(ids) // seq_len
    if not count:
        raise MorError(
            f"{path} has {len(ids)} tokens, fewer than one sequence of seq_len={seq_len}"
        )
    rows = torch.tensor(ids[: count * seq_len]).view(count, seq_len)
    return [{"input_ids": row} for row in rows]


def fold_table(
    source: MoRForCausalLM,
    sequences: Any,
    foldings: Sequence[Folding],
    *,
    max_sequences: int | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    tell: Callable[[FoldRow], None] = lambda row: None,
) -> list[FoldRow]:
    """NLL of ``source`` and of every folding of it, on the same sequences.

    Args:
        source: a vanilla model, on the device that it is to run on.
        sequences: items with ``input_ids`` [T].
        foldings: those that keep every token at every depth say what folding alone costs.
        max_sequences: how many sequences to look at; None for all.
        batch_size: sequences at a time.
        device: where singular values are taken.
        tell: called with each row as it is known.

    Raises:
        MorError: a folding does not fit.
    """
    count = len(sequences) if max_sequences is None else min(max_sequences, len(sequences))
    rows: list[FoldRow] = []

    def add(folding: Folding | None, model: MoRForCausalLM) -> None:
        found = run_pass(model.eval(), sequences, count, batch_size, "causal")
        unique = sum(p.numel() for p in model.parameters())
        rows.append(FoldRow(folding, found.nll, unique, model.config.num_hidden_layers))
        tell(rows[-1])

    add(None, source)
    for folding in foldings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # thinning stands in the table
            folded: Any = fold(source, folding, device)
        add(folding, folded.to(source.device))
        del folded
    return rows
