"""Text in, packed batches out: sources, tokenizer, token shards, dataset.

    index = prepare("shakespeare", "data/shakespeare")
    dataset = PackedDataset("data/shakespeare", "train", seq_len=512, order_seed=0)
    stream = TrainingSamples([dataset], per_step=8)

`prepare` reads documents (`iter_documents`), splits them into training and validation, trains a
byte-level BPE or takes a given tokenizer, and writes memory-mapped shards with an index
(`DataIndex`). `PackedDataset` reads them, and `TrainingSamples` numbers the samples of a whole run,
so that one that was stopped goes on at the exact sample. Every mistake in a file or a value is a
`MorError`.
"""

from mor.data.bos import Bos, prompt_tokens, resolve_bos
from mor.data.dataset import PackedDataset
from mor.data.documents import BadRow, Document
from mor.data.index import TRAIN, VALIDATION, DataIndex
from mor.data.prepare import SHARD_TOKENS, prepare
from mor.data.progress import Progress, console_progress, no_progress
from mor.data.samples import ResumableSampler, TrainingSamples
from mor.data.shards import ShardInfo, TokenShard
from mor.data.single_pass import Limits, StreamOptions
from mor.data.sources import iter_documents
from mor.data.tokenizer import load_tokenizer, train_tokenizer
from mor.data.writer import ShardWriter

__all__ = [
    "prepare",
    "SHARD_TOKENS",
    "StreamOptions",
    "Limits",
    "PackedDataset",
    "TrainingSamples",
    "ResumableSampler",
    "DataIndex",
    "TRAIN",
    "VALIDATION",
    "Document",
    "BadRow",
    "Bos",
    "prompt_tokens",
    "resolve_bos",
    "iter_documents",
    "train_tokenizer",
    "load_tokenizer",
    "TokenShard",
    "ShardWriter",
    "ShardInfo",
    "Progress",
    "console_progress",
    "no_progress",
]
