"""How much the engine takes on at a time: its numbers, checked, with their defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mor.checks import check_choice, check_flag, check_whole
from mor.config import MoRConfig
from mor.engine.entries import KVCacheType
from mor.engine.forms import AttentionName
from mor.engine.memory import check_fraction, pages_for, tokens_held
from mor.errors import MorError
from mor.model.packed import check_quantization


@dataclass(frozen=True)
class Sizes:
    """What :class:`~mor.engine.Engine` was asked for, every default worked out.

    Attributes:
        max_num_seqs: new tokens that one pass of the block carries.
        max_residents: requests that hold pages at a time.
        min_gather: tokens that wait for the coda before it runs.
        prefill_chunk: tokens of prompts that one pass of the block carries.
        page_size: tokens per page.
        max_model_len: most tokens of prompt and output together; see :meth:`fit`.
        max_depth: depth cap for all requests.
    """

    max_num_seqs: int
    max_residents: int
    min_gather: int
    prefill_chunk: int
    page_size: int
    max_model_len: int
    max_depth: int

    def fit(self, config: MoRConfig, num_pages: int, least: int = 2) -> Sizes:
        """The same for a pool of ``num_pages``: ``max_model_len`` is what it holds.

        Args:
            config: the model's.
            num_pages: pages in the pool.
            least: tokens of prompt and answer that must fit, or ``max_model_len`` where that is
                less.

        Raises:
            MorError: the pool is too small for that.
        """
        check_whole("num_pages", num_pages, 1)
        held = tokens_held(config, num_pages, self.max_depth, self.page_size)
        longest = held + 1  # the last token of an answer is never read again: it needs no place
        least = min(least, self.max_model_len)
        if not held or longest < least:
            needed = pages_for(config, max(1, least - 1), self.max_depth, self.page_size)
            raise MorError(
                f"num_pages={num_pages} with page_size={self.page_size} holds no request of "
                f"{least} tokens, prompt and answer together; give at least {needed} pages"
            )
        return replace(self, max_model_len=min(self.max_model_len, longest))

    @property
    def lanes(self) -> int:
        """Tokens in flight at most."""
        return self.max_residents + 2 * self.prefill_chunk


@dataclass(frozen=True)
class Speculate:
    """What is asked for.

    Attributes:
        tokens: guesses at a time at most; 0 turns speculation off.
        depth: recursions that a guess may take.
        always: also where it does not pay.
    """

    tokens: int = 0
    depth: int = 1
    always: bool = False


def resolve_sizes(
    config: MoRConfig,
    *,
    max_num_seqs: int,
    max_residents: int | None,
    min_gather: int | None,
    prefill_chunk: int,
    page_size: int,
    max_model_len: int | None,
    max_depth: int | None,
) -> Sizes:
    """The engine's numbers for a model; None stands for a default.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """
    longest, deepest = config.max_position_embeddings, config.num_recursions
    numbers = {
        "max_num_seqs": max_num_seqs,
        "max_residents": 2 * max_num_seqs if max_residents is None else max_residents,
        "min_gather": max(1, max_num_seqs // 2) if min_gather is None else min_gather,
        "prefill_chunk": prefill_chunk,
        "page_size": page_size,
    }
    for name, value in numbers.items():
        check_whole(name, value, 1)
    length = longest if max_model_len is None else max_model_len
    check_whole("max_model_len", length, 1, longest)
    depth = deepest if max_depth is None else max_depth
    check_whole("max_depth", depth, 1, deepest)
    fixed = config.router_fixed_depth if config.router == "fixed" else None
    return Sizes(**numbers, max_model_len=length, max_depth=min(fixed or deepest, depth))


def check_speculation(
    config: MoRConfig, sizes: Sizes, speculate: int, draft_depth: int, always: bool
) -> Speculate:
    """What is asked for, where the model and the sizes allow it.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """
    check_whole("speculate", speculate, 0)
    check_whole("draft_depth", draft_depth, 1)
    check_flag("speculate_always", always)
    asked = Speculate(speculate, draft_depth, always)
    if not speculate:
        return asked
    if config.interleaved:
        raise MorError(
            f"speculate={speculate} needs depths that can be left out; sharing="
            f"{config.sharing!r} runs all of them in one pass"
        )
    if draft_depth >= sizes.max_depth:
        raise MorError(
            f"draft_depth={draft_depth} must be less than the {sizes.max_depth} recursions that "
            "tokens may run; with speculate=0 nothing is guessed"
        )
    if speculate >= sizes.prefill_chunk:
        raise MorError(
            f"speculate={speculate} must be less than prefill_chunk={sizes.prefill_chunk}: guesses "
            "are checked in one chunk"
        )
    return asked


def check_options(
    config: MoRConfig,
    *,
    num_pages: int | None,
    memory_fraction: float,
    quantization: str | None,
    kv_cache_dtype: str,
    attention: str = "auto",
    prefix_caching: bool,
    speculate: int = 0,
    draft_depth: int = 1,
    speculate_always: bool = False,
    least: int,
    **numbers: int | None,
) -> None:
    """Refuse what :class:`~mor.engine.Engine` would refuse, before a model is loaded for it.

    Args:
        config: the model's.
        num_pages, memory_fraction, quantization, kv_cache_dtype, attention, prefix_caching,
            speculate, draft_depth, speculate_always: as the engine's.
        least: tokens of prompt and answer that ``num_pages`` must hold.
        numbers: what :func:`resolve_sizes` takes.

    Raises:
        MorError: naming the argument, its value and what would be right.
    """
    sizes = resolve_sizes(config, **numbers)  # type: ignore[arg-type]
    if num_pages is not None:
        sizes.fit(config, num_pages, least)
    check_fraction(memory_fraction)
    check_quantization(quantization)
    check_choice("kv_cache_dtype", kv_cache_dtype, KVCacheType)
    check_choice("attention", attention, AttentionName)
    check_flag("prefix_caching", prefix_caching)
    check_speculation(config, sizes, speculate, draft_depth, speculate_always)
