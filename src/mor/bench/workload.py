"""What is asked of every system: the same requests, in the same order, from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mor.errors import MorError

Kind = Literal["paper", "prompts", "latency", "protocol"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Ask:
    """One request of a workload.

    Attributes:
        prompt: token ids.
        new_tokens: exactly so many, greedy, end of text ignored.
    """

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests under a closed load.

    Attributes:
        name: what the table calls it.
        asks: the requests, in order.
        concurrency: clients; each sends its next request when its last is answered.
        pass_tokens: most new tokens in one pass of the block of our engine; None for all that the
            clients have.
        protocol: the paper's way instead: passes of ``concurrency`` tokens, the exits gathered to
            as many, and requests enough for both; see :meth:`sizes`.
        relative: tokens of a pass in the protocol for systems of R recursions, by R (the paper's
            "relative maximum"); empty where all have the same.
        room: tokens of a request that engines make room for, where it is more than any has: so
            that a few short requests warm the very engine that the whole workload will use.
    """

    name: str
    asks: tuple[Ask, ...]
    concurrency: int
    pass_tokens: int | None = None
    protocol: bool = False
    relative: tuple[tuple[int, int], ...] = ()
    room: int = 0

    @property
    def output_tokens(self) -> int:
        """New tokens of all requests."""
        return sum(ask.new_tokens for ask in self.asks)

    @property
    def longest(self) -> int:
        """Most tokens of prompt and answer together, or the room that was asked for."""
        return max(self.room, *(len(ask.prompt) + ask.new_tokens for ask in self.asks))

    def sizes(self, recursions: int, saves_depth: bool) -> tuple[int, dict[str, int]]:
        """Clients, and sizes of our engine, for a model of R recursions.

        In the protocol a pass is always full and so is a gathering. Where tokens leave at unequal
        depths that takes twice as many requests as a pass has tokens: those that run, and those
        that wait for the gathering.
        """
        if not self.protocol:
            width = min(self.concurrency, self.pass_tokens or self.concurrency)
            return self.concurrency, {"max_num_seqs": width, "max_residents": self.concurrency}
        width = dict(self.relative).get(recursions, self.concurrency) if saves_depth else 0
        width = width or self.concurrency
        clients = 2 * width if saves_depth else width
        return clients, {
            "max_num_seqs": width,
            "max_residents": clients,
            "min_gather": width,
        }

    def record(self) -> dict[str, object]:
        """As it goes into a record."""
        return {
            "workload": self.name,
            "requests": len(self.asks),
            "output_tokens": self.output_tokens,
            "prompt_tokens": sum(len(ask.prompt) for ask in self.asks),
        }


@dataclass(frozen=True)
class Lengths:
    """Tokens of answers and prompts.

    Attributes:
        mean, deviation: of the normal distribution of output lengths.
        prompt: tokens before the first new one, in the paper's workload.
        prompt_low, prompt_high: the same in the workload with real prompts, uniform.
        scale: multiplies all of them but ``prompt``.
        longest: most tokens of prompt and answer together, from the model.
    """

    mean: float = 256.0
    deviation: float = 64.0
    prompt: int = 1
    prompt_low: int = 64
    prompt_high: int = 512
    scale: float = 1.0
    longest: int = 2048

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.mean >= 1 or not self.deviation >= 0 or not self.scale > 0:
            raise MorError(
                f"mean_tokens={self.mean}, sd_tokens={self.deviation}, scale={self.scale}: "
                "mean must be at least 1, the deviation not negative, the scale above 0"
            )
        if self.prompt < 1 or not 1 <= self.prompt_low <= self.prompt_high:
            raise MorError(
                f"prompt_tokens={self.prompt}, prompt_low={self.prompt_low}, "
                f"prompt_high={self.prompt_high}: at least 1, and in order"
            )

    def new_tokens(self, draw: random.Random) -> int:
        """A normal draw, cut at one and at twice the mean."""
        mean, deviation = self.mean * self.scale, self.deviation * self.scale
        return max(1, min(round(draw.gauss(mean, deviation)), round(2 * mean)))


def make_workload(
    kind: Kind,
    requests: int,
    concurrency: int,
    vocab_size: int,
    lengths: Lengths,
    seed: int = 0,
    text: Sequence[int] | None = None,
    pass_tokens: int | None = None,
    relative: Sequence[tuple[int, int]] = (),
) -> Workload:
    """A workload from its seed; the same arguments give the same requests.

    Args:
        kind: ``paper``: a prompt of ``lengths.prompt`` tokens (one random token stands for
            beginning-of-text, since with one and the same prompt and greedy decoding all answers
            would be one answer) and normal output lengths; ``protocol``: the same requests, with
            the paper's batch sizes; ``prompts``: prompts of ``prompt_low`` to ``prompt_high``
            tokens; ``latency``: as ``paper``, one client.
        requests, concurrency, pass_tokens, relative: see :class:`Workload`.
        vocab_size: ids are drawn from 1 to this.
        lengths: of prompts and answers.
        seed: of every draw.
        text: token ids to cut prompts from, in place of random ones.

    Raises:
        MorError: an unknown kind, or requests that are too long for the model.
    """
    if kind not in KINDS:
        raise MorError(f"workload={kind!r} is not known; use one of: {', '.join(KINDS)}")
    if requests < 1 or concurrency < 1:
        raise MorError(f"requests={requests}, concurrency={concurrency}: both must be at least 1")
    draw = random.Random(f"{'prompts' if kind == 'prompts' else 'paper'} {seed}")
    asks = []
    for _ in range(requests):
        size = lengths.prompt
        if kind == "prompts":
            low, high = (
                max(1, round(n * lengths.scale)) for n in (lengths.prompt_low, lengths.prompt_high)
            )
            size = draw.randint(low, high)
        asks.append(Ask(_prompt(draw, size, vocab_size, text), lengths.new_tokens(draw)))
    clients = 1 if kind == "latency" else concurrency
    name = f"{kind} c{clients}" + (" relative" if relative else "")
    made = Workload(name, tuple(asks), clients, pass_tokens, kind == "protocol", tuple(relative))
    if made.longest > lengths.longest:
        raise MorError(
            f"workload={kind!r} has a request of {made.longest} tokens, but the model takes "
            f"{lengths.longest}; use a smaller --scale"
        )
    return made


def _prompt(
    draw: random.Random, size: int, vocab_size: int, text: Sequence[int] | None
) -> tuple[int, ...]:
    if text is None:
        return tuple(draw.randrange(1, vocab_size) for _ in range(size))
    if len(text) < size:
        raise MorError(f"the text has {len(text)} tokens, too few for a prompt of {size}")
    first = draw.randrange(len(text) - size + 1)
    return tuple(int(token) for token in text[first : first + size])
