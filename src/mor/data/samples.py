"""The samples of a whole training run, numbered from its first to its last.

    stream = TrainingSamples([dataset], per_step=8).take(steps * 8)
    sampler = ResumableSampler(stream, lambda: step * 8)

Sample n is a function of n, the seed and the data alone. A run that goes on at step s therefore
reads from sample s x per_step on, and reads nothing that lies before it. Epochs are not restarts
of the loader but stretches of this one sequence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mor.data.dataset import PackedDataset, read_rows, split_batch
from mor.data.mixture import Interleaving
from mor.errors import MorError


def spread(count: int, length: int) -> list[int]:
    """Which ``count`` of ``length`` sequences a sample is: evenly spread ones.

    Not the first ones: prepared text keeps the order of its sources, so that a corpus begins with
    one source alone.
    """
    return [number * length // count for number in range(count)]


class TrainingSamples(Dataset[dict[str, Tensor]]):
    """Rows of one dataset, or of several by weight, epoch after epoch.

    - **One dataset**: an epoch holds every row once, in a new random order, cut to a whole number
      of optimiser steps, so that each step sees as many tokens as the budget and the log count.
      What is left out differs between epochs, as the order does.
    - **A mixture**: sample n is from the dataset that is due (`mor.data.mixture`). Each dataset
      goes through its own epochs, every row once in each; one that is small for its weight is
      seen more often than another. An epoch of the mixture, which only the log speaks of, is as
      many samples as all datasets have rows.

    Attributes:
        parts: the datasets.
        per_step: samples of one optimiser step, over all ranks and micro-batches.
        epoch_length: samples of an epoch.
    """

    def __init__(
        self,
        parts: Sequence[PackedDataset],
        weights: Sequence[float] | None = None,
        *,
        per_step: int = 1,
        seed: int = 0,
    ) -> None:
        """Put the datasets together.

        Args:
            parts: of equal `seq_len`, `packing` and `document_mask`.
            weights: one per dataset; not needed for one.
            per_step: samples of one optimiser step.
            seed: of the interleaving; the order of the rows is the datasets' own.

        Raises:
            MorError: one dataset does not fill one step, a weight is missing or not above 0, or
                datasets differ in tokenizer or layout.
        """
        self.parts, self.per_step = list(parts), per_step
        first = self.parts[0]
        rows = [len(part) for part in self.parts]
        self._mixture: Interleaving | None = None
        if len(self.parts) == 1:
            self.epoch_length = rows[0] // per_step * per_step
            if not self.epoch_length:
                raise MorError(
                    f"split {first.split!r} of {first.index.directory} has {rows[0]} sequences of "
                    f"seq_len={first.seq_len}, fewer than the {per_step} of one optimiser step; "
                    "lower train.batch_size or train.gradient_accumulation_steps, or prepare more "
                    "text"
                )
        else:
            if weights is None or len(weights) != len(self.parts):
                raise MorError(f"weights are {weights}, expected {len(self.parts)}, one per folder")
            self._mixture = Interleaving(weights, seed)
            self.epoch_length = sum(rows)
        layouts = {(part.seq_len, part.packing, part.document_mask) for part in self.parts}
        if len(layouts) > 1:
            raise MorError(f"datasets of one mixture differ in layout: {sorted(layouts)}")
        for part in self.parts[1:]:
            part.index.check_same_tokenizer(first.index)
        self._length = self.epoch_length

    def take(self, num_samples: int) -> TrainingSamples:
        """The first `num_samples` of it: what a whole run reads."""
        taken = copy.copy(self)
        taken._length = num_samples
        return taken

    def __len__(self) -> int:
        """Samples: one epoch, or what `take` was given."""
        return self._length

    def locate(self, sample: int) -> tuple[PackedDataset, int]:
        """The dataset that `sample` is from, and its row."""
        if not 0 <= sample < self._length:
            raise IndexError(f"sample {sample} of {self._length}")
        if self._mixture is None:
            part = self.parts[0]
            epoch, index = divmod(sample, self.epoch_length)
        else:
            number, index = self._mixture.at(sample)
            part = self.parts[number]
            epoch, index = divmod(index, len(part))
        return part, part.chunk(index, epoch)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        """A sample, as in `PackedDataset`. Raises `MorError` where the shard is damaged."""
        return self.__getitems__([sample])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Tensor]]:
        """Several samples at once, as a data loader asks for a batch. Raises as `__getitem__`."""
        return split_batch(read_rows([self.locate(sample) for sample in numbers]))

    def epoch_at(self, sample: int) -> float:
        """Epochs gone by before `sample`."""
        return sample / self.epoch_length

    @property
    def num_fresh(self) -> int:
        """How many samples there are before one is seen for the second time."""
        if self._mixture is None:
            return self.epoch_length
        rows = [len(part) for part in self.parts]
        return min(self._mixture.first(number, count) for number, count in enumerate(rows))


class ResumableSampler(Sampler[int]):
    """The samples of a stream in order, from where the run stands.

    Its length is that of the whole stream, because the Hugging Face trainer reckons epochs by it.
    """

    def __init__(self, stream: TrainingSamples, start: Callable[[], int]) -> None:
        """`start()` is asked when iteration begins: how many samples the run has had."""
        self._stream, self._start = stream, start

    def __len__(self) -> int:
        """Samples of the whole stream."""
        return len(self._stream)

    def __iter__(self) -> Iterator[int]:
        """Yield numbers of samples."""
        return iter(range(self._start(), len(self._stream)))
