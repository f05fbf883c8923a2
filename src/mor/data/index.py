"""The index of a prepared data folder: what is in it and how it came about.

DIR/index.json             this
DIR/tokenizer/             a Hugging Face tokenizer folder
DIR/train-00000.bin ...    token shards (mor.data.shards)
DIR/validation-00000.bin ...
DIR/packing/           plans of best-fit packing, made when first needed (mor.data.packing)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mor.data.bos import Bos
from mor.data.content import check_content
from mor.data.progress import Progress, no_progress
from mor.data.shards import ShardInfo, TokenShard
from mor.data.task_marks import TaskMarks
from mor.data.tasks import SolvedMarks, read_marks
from mor.data.tokenizer import load_tokenizer
from mor.errors import MorError, describe_missing

INDEX_FILE = "index.json"
TOKENIZER_FOLDER = "tokenizer"
PACKING_FOLDER = "packing"
TRAIN, VALIDATION = "train", "validation"
FORMAT = "mor-data"
VERSION = 1


@dataclass(frozen=True)
class DataIndex:
    """A prepared data folder.

    Attributes:
        directory: the folder; not stored in it, so a folder can be moved.
        splits: the shards of each split, in reading order.
        vocab_size: every token id is below this.
        eos_token_id: ends every document.
        bos_token_id: the tokenizer's BOS, None where it has none.
        add_bos_token: whether every document begins with it (`mor.data.bos`); None in folders from
            before this was recorded, whose documents have no BOS.
        source: what was asked for, such as `shakespeare` or a path.
        command: the command line that made it.
        program: name and version of the program that made it.
        preparation: everything that decides the content: digests of the source and of a given
            tokenizer, and the parameters. Two folders with the same preparation hold the same.
        num_duplicates, num_empty: documents left out, as exact copies or without any text.
        skipped: bad rows left out, by kind (`mor.data.documents.KINDS`).
        reused: True if `prepare` found the folder already there and made nothing (not stored).
    """

    directory: Path
    splits: Mapping[str, tuple[ShardInfo, ...]]
    vocab_size: int
    eos_token_id: int
    source: str
    command: str
    program: str
    preparation: Mapping[str, Any]
    num_duplicates: int = 0
    num_empty: int = 0
    bos_token_id: int | None = None
    add_bos_token: bool | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    reused: bool = False

    @property
    def task(self) -> TaskMarks | SolvedMarks | None:
        """Queries and difficulties of a made-up task (`mor.data.tasks`); None for text."""
        there = self.preparation.get("task")
        return None if there is None else read_marks(there)

    @property
    def bos(self) -> Bos:
        """What every document begins with."""
        return Bos(self.bos_token_id, self.add_bos_token)

    def known_bos(self) -> Bos:
        """`bos`, with the token that an older index leaves out taken from the tokenizer.

        Raises:
            MorError: the tokenizer cannot be read.
        """
        if self.add_bos_token is not None or not self.tokenizer_dir.is_dir():
            return self.bos
        return Bos(load_tokenizer(self.tokenizer_dir).bos_token_id, False)

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer folder, for `AutoTokenizer.from_pretrained`."""
        return self.directory / TOKENIZER_FOLDER

    def shards(self, split: str) -> tuple[ShardInfo, ...]:
        """The shards of `split`. Raises `MorError` naming the splits there are."""
        if split not in self.splits:
            raise MorError(
                f"{self.directory} has no split {split!r}; its splits: {', '.join(self.splits)}"
            )
        return self.splits[split]

    def document_length(self) -> int | None:
        """Tokens of every document of a task; None for text, and where documents differ."""
        sizes = {divmod(self.num_tokens(s), self.num_documents(s)) for s in self.splits}
        if self.task is None or len(sizes) != 1:
            return None
        length, rest = sizes.pop()
        return length if rest == 0 else None

    def num_tokens(self, split: str) -> int:
        """Tokens of `split`, BOS and end-of-text token of each document included."""
        return sum(shard.num_tokens for shard in self.shards(split))

    def num_documents(self, split: str) -> int:
        """Documents of `split`."""
        return sum(shard.num_documents for shard in self.shards(split))

    def num_bytes(self, split: str) -> int:
        """UTF-8 bytes of the text of `split`."""
        return sum(shard.num_bytes for shard in self.shards(split))

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text per token; BOS and end of text count as tokens without text.

        Bits per byte = NLL per token in nats / ln 2 / this.
        """
        return self.num_bytes(split) / self.num_tokens(split)

    def open_shards(self, split: str) -> list[TokenShard]:
        """Open every shard of `split` and compare its header with the index.

        Raises:
            MorError: unknown split, or a shard is missing, damaged or not the one indexed.
        """
        return [self._open(info) for info in self.shards(split)]

    def verify(self) -> Iterator[ShardInfo]:
        """Check every byte of every shard, yielding each one that is whole.

        Raises:
            MorError: naming the first shard that is missing or damaged.
        """
        for split in self.splits:
            for info in self.shards(split):
                self.verify_shard(info)
                yield info

    def verify_shard(self, info: ShardInfo) -> None:
        """Check every byte of one shard.

        Raises:
            MorError: it is missing or damaged; the message names it and says what to do.
        """
        self._open(info).verify(info.sha256, self.remedy)

    def verify_all(self, progress: Progress = no_progress) -> None:
        """Check every byte of every shard and name all that are missing or damaged.

        Raises:
            MorError: naming them, and what to do.
        """
        infos = [info for split in self.splits for info in self.shards(split)]
        total = sum((self.directory / i.file).stat().st_size for i in infos if self._has(i))
        done, wrong = 0, []
        for info in infos:
            try:
                self.verify_shard(info)
            except MorError as error:
                wrong.append(str(error))
            done += (self.directory / info.file).stat().st_size if self._has(info) else 0
            progress("verifying", done, total)
        if wrong:
            raise MorError("; and ".join(wrong))

    def _has(self, info: ShardInfo) -> bool:
        return (self.directory / info.file).is_file()

    @property
    def remedy(self) -> str:
        """For messages: what to do about a shard that is damaged."""
        made = f" (it was made by: {self.command})" if self.command else ""
        return f"copy it anew from where the folder came from, or prepare the data again{made}"

    def _open(self, info: ShardInfo) -> TokenShard:
        try:
            shard = TokenShard(self.directory / info.file)
        except MorError as error:
            raise MorError(f"{error}; {self.remedy}") from error
        for name in ("num_tokens", "num_documents", "num_bytes"):
            found, expected = getattr(shard, name), getattr(info, name)
            if found != expected:
                raise MorError(
                    f"shard {shard.path} is not the one in {INDEX_FILE}: "
                    f"{name} is {found}, expected {expected}; {self.remedy}"
                )
        if shard.vocab_size != self.vocab_size:
            raise MorError(
                f"shard {shard.path} is for a vocabulary of {shard.vocab_size}, "
                f"{INDEX_FILE} says {self.vocab_size}"
            )
        return shard

    def check_same_tokenizer(self, other: DataIndex) -> None:
        """Refuse to mix tokens of two tokenizers, or documents with BOS and without.

        Raises:
            MorError: the folders were prepared differently; the message says how to mend.
        """
        mine, theirs = (self.tokenizer_digest(), other.tokenizer_digest())
        if (self.vocab_size, self.eos_token_id, mine) != (
            other.vocab_size,
            other.eos_token_id,
            theirs,
        ):
            raise MorError(
                f"{self.directory} was prepared with another tokenizer than {other.directory} "
                f"(vocabulary {self.vocab_size} and {other.vocab_size}); prepare one of them again "
                f"with --tokenizer {other.tokenizer_dir}"
            )
        if self.bos.start != other.bos.start:
            raise MorError(
                f"{self.directory} was prepared {self.bos.describe()}, {other.directory} "
                f"{other.bos.describe()}; prepare one of them again with "
                f"--bos {'always' if self.bos.start else 'never'}"
            )

    def tokenizer_digest(self) -> str:
        """SHA-256 (hex) of the tokenizer's rules for the text itself.

        What it puts around a text is left out: that is `bos`.

        Raises:
            MorError: it cannot be read.
        """
        from tokenizers import Tokenizer

        path = self.tokenizer_dir / "tokenizer.json"
        try:
            rules = json.loads(Tokenizer.from_file(str(path)).to_str())
        except Exception as error:  # the library raises plain Exceptions
            raise MorError(f"tokenizer {path} cannot be read: {error}") from error
        rules["post_processor"] = None
        return hashlib.sha256(json.dumps(rules).encode("utf-8")).hexdigest()

    def save(self) -> None:
        """Write `index.json` into `directory`."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION} | asdict(self)
        del content["directory"], content["reused"]
        content["tokenizer"] = TOKENIZER_FOLDER
        for split in self.splits:
            content["splits"][split] = {
                "num_tokens": self.num_tokens(split),
                "num_documents": self.num_documents(split),
                "num_bytes": self.num_bytes(split),
                "shards": [asdict(shard) for shard in self.shards(split)],
            }
        path = self.directory / INDEX_FILE
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> DataIndex:
        """Read the index of a prepared folder.

        Raises:
            MorError: the folder is missing, was not made by `mor data prepare`, or its index is
                damaged or of another version.
        """
        folder = Path(directory).expanduser()
        if not folder.is_dir():
            raise MorError(
                f"data folder {folder} {describe_missing(folder)}; make it with mor data prepare"
            )
        path = folder / INDEX_FILE
        if not path.is_file():
            raise MorError(
                f"{folder} is not a prepared data folder: it has no {INDEX_FILE}; "
                f"make one with mor data prepare"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MorError(f"{path} is damaged: {error}") from error
        if isinstance(content, dict) and content.get("format") == "mor-media":
            raise MorError(f"{folder} holds {content.get('kind')}, where tokens are expected")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise MorError(f"{path} is not the index of a prepared data folder")
        if content.get("version") != VERSION:
            raise MorError(
                f"{path} has version {content.get('version')}, this program reads {VERSION}; "
                f"prepare the data again"
            )
        try:
            return cls(directory=folder, **check_content(content))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MorError(f"{path} is damaged: {error!r}") from error
