"""What a text begins with: one policy for documents, prompts, evaluation and serving.

Some tokenizers put a beginning-of-sequence token (BOS) before every text, and a model that was
trained so must be asked so. The policy is kept in the index of prepared data and in a model's
configuration (`bos_token_id`, `add_bos_token`), and the tokenizer saved beside either does the
same by itself. Whoever makes token ids of a text asks here (documents: `DocumentEncoder`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from mor.errors import MorError

if TYPE_CHECKING:  # it brings transformers, which takes seconds to import
    from mor.config import MoRConfig

BosMode = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Bos:
    """Which token begins a text.

    Attributes:
        token: the tokenizer's BOS, whether it is used or not; None where there is none.
        added: whether every text begins with it; None where nobody wrote that down.
    """

    token: int | None
    added: bool | None

    @property
    def start(self) -> tuple[int, ...]:
        """Ids that a text begins with."""
        return (self.token,) if self.added and self.token is not None else ()

    def describe(self) -> str:
        """The policy in words: ``with BOS (id 1)`` or ``without BOS``."""
        return f"with BOS (id {self.start[0]})" if self.start else "without BOS"


def own_frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a tokenizer of itself puts before and after a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = list(found["input_ids"]), list(found["special_tokens_mask"])
    if 0 not in mask:
        return (), ()
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return tuple(ids[:first]), tuple(ids[last:])


def resolve_bos(tokenizer: Any, mode: str) -> Bos:
    """The policy that `--bos` asks for.

    Args:
        tokenizer: a Hugging Face tokenizer.
        mode: `auto` (as the tokenizer itself does when it adds special tokens), `always`, `never`.

    Raises:
        MorError: another mode, `always` without a BOS token, or a tokenizer whose texts begin with
            more than one token.
    """
    if mode not in get_args(BosMode):
        raise MorError(f"bos={mode!r} is not known; use one of: {', '.join(get_args(BosMode))}")
    start, _ = own_frame(tokenizer)
    if mode == "auto" and len(start) > 1:
        raise MorError(
            f"the tokenizer begins a text with {len(start)} tokens {list(start)}, expected one BOS "
            "or none; use bos=always or bos=never"
        )
    token = start[0] if len(start) == 1 else tokenizer.bos_token_id
    if mode == "always" and token is None:
        raise MorError("bos=always needs a tokenizer with a bos_token, this one has none; use auto")
    return Bos(token, bool(start) if mode == "auto" else mode == "always")


def apply_bos(tokenizer: Any, bos: Bos) -> Any:
    """The tokenizer, or a copy of it, that of itself begins texts as `bos` says and ends none.

    So everyone who only calls the tokenizer does what the model was trained on. Documents and
    prompts are the same text; what ends a document is written by `DocumentEncoder`.

    Raises:
        MorError: the tokenizer cannot do so.
    """
    if own_frame(tokenizer) == (bos.start, ()):
        return tokenizer
    adapted = copy.deepcopy(tokenizer)
    if bos.start and adapted.bos_token_id != bos.token:
        adapted.bos_token = adapted.convert_ids_to_tokens(bos.token)
    added = bool(bos.start)
    # The settings are saved from here; the attributes act.
    adapted.init_kwargs |= {"add_bos_token": added, "add_eos_token": False}
    adapted.add_eos_token, adapted.add_bos_token = False, added
    if own_frame(adapted) != (bos.start, ()):
        raise MorError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot be told to begin texts "
            f"{bos.describe()}; change its post-processor and prepare again with bos=auto"
        )
    return adapted


def model_bos(config: MoRConfig, tokenizer: Any = None) -> Bos:
    """The policy of a model: what its configuration says, else what the tokenizer beside it does.

    Models of ours from before the policy was written down were trained on texts without BOS, and
    their `bos_token_id` is the end-of-text token: that is taken as no BOS.

    Args:
        config: the model's.
        tokenizer: the one beside it; None where there is none.
    """
    if config.add_bos_token is not None:
        return Bos(config.bos_token_id, config.add_bos_token)
    if tokenizer is None:
        return Bos(config.bos_token_id, None)
    start, _ = own_frame(tokenizer)
    ours = config.bos_token_id in _ends(config) and config.bos_token_id not in start
    token = start[0] if len(start) == 1 else tokenizer.bos_token_id
    return Bos(token, bool(start) and not ours)


def _ends(config: MoRConfig) -> list[int]:
    ends = config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def text_start(tokenizer: Any, config: MoRConfig | None = None) -> tuple[int, ...]:
    """Ids that every text begins with.

    Args:
        tokenizer: of the model.
        config: of the model; None: as the tokenizer does.
    """
    if config is None:
        return own_frame(tokenizer)[0]
    bos = model_bos(config, tokenizer)
    if config.add_bos_token is None and bos.added:
        return own_frame(tokenizer)[0]  # of more than one token, where nothing says otherwise
    return bos.start


def prompt_tokens(text: str, tokenizer: Any, config: MoRConfig) -> list[int]:
    """Token ids of a prompt: a text as documents begin, without an end.

    A BOS that the text itself spells out, as a chat template does, is not doubled. An empty prompt
    is what a document begins with; without BOS that is the model's `bos_token_id`, but where it is
    a token that no document begins with, the end of text, which comes before every document.

    Args:
        text: the prompt; special tokens that it spells out are taken as such.
        tokenizer, config: of the model.

    Returns:
        The ids; empty where the text is and the model names no token to begin with.
    """
    check_unicode(text, "the prompt")
    start = text_start(tokenizer, config)
    ids = list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
    if start:
        return ids if tuple(ids[: len(start)]) == start else [*start, *ids]
    if ids:
        return ids
    ends, first = _ends(config), config.bos_token_id
    if first is None or (ends and first == tokenizer.bos_token_id and first not in ends):
        return ends[:1]
    return [first]


def check_unicode(text: str, what: str) -> None:
    """Raise `MorError` where `text` holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MorError(f"{what} is not valid Unicode: {error}") from None


def check_same_bos(model: Bos, data: Bos, whose: str, folder: object) -> None:
    """Refuse a model that reads texts otherwise than the data was prepared.

    Args:
        model: policy of the model; where it is not known (`added` is None) nothing is refused.
        data: policy of the data.
        whose: names the model in the message.
        folder: the data folder.

    Raises:
        MorError: one has a BOS where the other has none, or another.
    """
    if model.added is None or model.start == data.start:
        return
    old = " (before that was recorded)" if data.added is None else ""
    raise MorError(
        f"{folder} was prepared {data.describe()}{old}, but {whose} begins every text "
        f"{model.describe()}; prepare the text again with "
        f"--bos {'always' if model.start else 'never'}"
    )


def start_texts(tokenizer: Any, start: Sequence[int]) -> str:
    """`start` as it is spelled, for a chat template or a message."""
    return "".join(map(str, tokenizer.convert_ids_to_tokens(list(start))))
