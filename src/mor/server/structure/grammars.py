"""Grammars compiled for a tokenizer: which tokens may come next (llguidance)."""

from __future__ import annotations

import asyncio
import re
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mor.errors import install_hint
from mor.server.errors import ApiError, explain_grammar
from mor.server.structure.sources import MAX_SOURCE, Source

CACHED = 64
# Processor seconds of the engine's thread: what a grammar may cost all its completions together.
BURST, PER_TOKEN = 0.5, 0.01  # a usual one costs a tenth of a millisecond per token
NEEDED = f"needs the package llguidance on the server: {install_hint('grammar')}"


class Work:
    """What the completions of one grammar have cost the engine's thread.

    The library bounds the memory of a step, but not its time where texts are very long.
    """

    def __init__(self) -> None:
        self._left = BURST

    def note(self, seconds: float) -> None:
        """A token more, and what its mask cost."""
        self._left += PER_TOKEN - seconds

    @property
    def too_much(self) -> bool:
        """Whether others would wait for this."""
        return self._left < 0


class MatcherConstraint:
    """One completion's way through a grammar (:class:`mor.engine.constraint.Constraint`).

    Args:
        matcher: of llguidance, at the beginning; from now on it belongs to this.
        never: a token id that only stands for the end where the model has none.
        work: of all completions of this grammar.
    """

    def __init__(self, matcher: Any, never: int | None, work: Work) -> None:
        self._matcher, self._never, self._work = matcher, never, work

    def allowed(self) -> NDArray[np.bool_]:
        """[tokens] which may come next; those past its end may not."""
        begun = time.thread_time()
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._work.note(time.thread_time() - begun)
        bits = np.unpackbits(mask, bitorder="little").astype(bool)
        if self._never is not None:
            bits[self._never :] = False
        return bits

    def take(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped()) and not self.failed

    @property
    def failed(self) -> bool:
        """Whether a token was refused, or the grammar is too much work."""
        return bool(self._matcher.is_error()) or self._work.too_much


class TokenGrammar:
    """A compiled grammar; completions begin it again and again."""

    def __init__(self, matcher: Any, never: int | None) -> None:
        self._matcher, self._never, self._work = matcher, never, Work()

    def begin(self) -> MatcherConstraint:
        """The beginning, for one completion."""
        return MatcherConstraint(self._matcher.deep_copy(), self._never, self._work)


class Grammars:
    """Compiles grammars in a thread of its own, each once; keeps the last few.

    Args:
        tokenizer: a fast one of Transformers'.
        ends: token ids that end a text.
        vocab_size: of the model, which may know more ids than the tokenizer, or fewer.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], vocab_size: int) -> None:
        self._tokenizer, self._ends, self._vocab_size = tokenizer, sorted(ends), vocab_size
        self._thread = ThreadPoolExecutor(1, "mor-grammars")
        self._compiled: OrderedDict[tuple[str, str], TokenGrammar] = OrderedDict()
        self._tokens: tuple[Any, int | None] | None = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def compile(self, source: Source) -> TokenGrammar:
        """A grammar, ready for use.

        Raises:
            ApiError: it is wrong, too large or too complex; the package for it is not there.
        """
        key = (source.kind, source.text)
        if key in self._compiled:
            self._compiled.move_to_end(key)
            return self._compiled[key]
        if len(source.text) > MAX_SOURCE:
            raise _refuse(source.name, f"is longer than {MAX_SOURCE} characters")
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._thread, self._compile, source)
        self._compiled[key] = made
        while len(self._compiled) > CACHED:
            self._compiled.popitem(last=False)
        return made

    # In the thread -------------------------------------------------------------------------------

    def _compile(self, source: Source) -> TokenGrammar:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise ApiError(
                400, f"{source.name} {NEEDED}", param=source.name, code="unsupported_parameter"
            ) from None
        if self._tokens is None:
            self._tokens = self._read_tokenizer(llguidance, source)
        tokens, never = self._tokens
        # Work per token and memory are bounded, whatever a client sends.
        limits = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)

        def match(text: str) -> Any:
            return llguidance.LLMatcher(tokens, text, log_level=0, limits=limits)

        try:
            matcher = match(_translate(llguidance.grammar_from, source))
        except ValueError as error:
            raise _refuse(source.name, _tidy(str(error))) from None
        if matcher.is_error():
            for name, schema in source.parts.items():
                alone = match(llguidance.grammar_from("lark", f"start: %json {schema}"))
                if alone.is_error():
                    raise _refuse(name, _tidy(alone.get_error()))
            raise _refuse(source.name, _tidy(matcher.get_error()))
        # The first token's work may be seconds; copies find it done.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise explain_grammar(source.name)
        return TokenGrammar(matcher, never)

    def _read_tokenizer(self, llguidance: Any, source: Source) -> tuple[Any, int | None]:
        """The tokenizer as the library knows it, and an end of text of our own where none is."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refuse(source.name, "needs a model with a fast tokenizer", supported=False)
        rules = type(backend).from_str(backend.to_str())
        rules.no_padding()
        rules.no_truncation()
        ends, never = self._ends, None
        known = rules.get_vocab_size()
        ends = [token for token in ends if token < known]
        if not ends:
            never = known
            rules.add_special_tokens(["<|no-end-of-text|>"])
            ends = [never]
        size = max(self._vocab_size, rules.get_vocab_size())
        return llguidance.LLTokenizer(rules.to_str(), n_vocab=size, eos_token=ends), never


def _translate(grammar_from: Any, source: Source) -> str:
    try:
        return str(grammar_from(source.kind, source.text))
    except Exception as error:  # whatever its reader of GBNF raises
        raise ValueError(str(error)) from None


def _tidy(message: str) -> str:
    """The library's message in one line, without the copy of the grammar in it."""
    lines = [line for line in message.splitlines() if not re.match(r"\s*(\d* *\||\^|$)", line)]
    return re.sub(r"^at \d+\(\d+\): ", "", " ".join(" ".join(lines).split()))[:300]


def _refuse(name: str, why: str, supported: bool = True) -> ApiError:
    code = "invalid_value" if supported else "unsupported_parameter"
    return ApiError(400, f"{name}: {why}", param=name, code=code)
