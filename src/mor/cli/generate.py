"""``mor generate``: write text, coloured by depth."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import set_seed

from mor.checks import MAX_SEED
from mor.cli.common import open_model
from mor.data import prompt_tokens
from mor.errors import MorError
from mor.folder.tokenizer import load_tokenizer
from mor.hf.generate import generate_with_depths
from mor.report import render_terminal
from mor.report.colors import printable
from mor.run_files import DEFAULT_MODEL

CONTEXT = 8  # tokens before a new one that decide how its text is written (spaces, characters)


def generate(
    model: Annotated[
        Path, typer.Argument(help="a model folder or a run folder; default one that ships")
    ] = DEFAULT_MODEL,
    prompt: Annotated[str, typer.Option(help="text to go on from; - reads standard input")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="at most so many")] = 200,
    greedy: Annotated[bool, typer.Option(help="always the likeliest token")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the same as --greedy")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="0: off")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1: none")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    max_depth: Annotated[int | None, typer.Option(help="cap on recursions per token")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on past the end-of-text token")] = False,
    color: Annotated[bool, typer.Option(help="colour each token by its depth")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Go on from PROMPT, streaming; each token's colour tells how many recursions it cost."""
    loaded, tokenizer = open_model(model), load_tokenizer(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_prompt(tokenizer, text, loaded.config, max_new_tokens)
    recursions = loaded.config.num_recursions
    if max_depth is not None and not 1 <= max_depth <= recursions:
        raise MorError(f"max_depth={max_depth} must lie in 1..{recursions}")
    sampling = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    for name, value in (sampling | {"repetition_penalty": repetition_penalty}).items():
        if not math.isfinite(value):
            raise MorError(f"{name}={value} must be a finite number")
    if 0 < temperature < 1e-3:
        raise MorError(f"temperature={temperature} must be 0 (greedy) or at least 0.001")
    greedy = greedy or temperature == 0
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": not greedy}
    if not greedy:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"min_p": min_p} if min_p else {}
    if repetition_penalty != 1.0:
        options["repetition_penalty"] = repetition_penalty
    if max_depth is not None:
        options["max_depth"] = max_depth
    if ignore_eos:
        loaded.generation_config.eos_token_id = None
    set_seed(seed)
    printer = StreamPrinter(tokenizer, recursions, color=color)
    if not as_json:
        printer.begin(text, ids[0].tolist())
    began = time.perf_counter()
    on_token = None if as_json else printer.put
    tokens, depths = generate_with_depths(loaded, ids.to(loaded.device), on_token, **options)
    seconds = time.perf_counter() - began
    mean = sum(depths) / max(1, len(depths))
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "prompt": text,
                    "text": tokenizer.decode(tokens),
                    "token_ids": tokens,
                    "depths": depths,
                    "mean_depth": mean,
                    "seconds": seconds,
                    "tokens_per_s": len(tokens) / seconds,
                }
            )
        )
        return
    printer.end()
    Console(stderr=True, highlight=False).print(
        f"{len(tokens)} tokens, mean depth {mean:z.2f} of {recursions}, "
        f"{len(tokens) / seconds:z.1f} tokens/s",
        style="dim",
    )


def encode_prompt(tokenizer: Any, text: str, config: Any, max_new_tokens: int) -> torch.Tensor:
    """Prompt ids [1, T], begun as the model's texts are (`mor.data.bos.prompt_tokens`).

    Raises:
        MorError: the prompt and what is to follow do not fit the model's maximum, or the tokenizer
            is not the model's.
    """
    ids = prompt_tokens(text, tokenizer, config)
    if not ids:
        raise MorError("prompt is empty and the model has no beginning-of-text token")
    if max(ids) >= config.vocab_size:
        raise MorError(
            f"prompt has token id {max(ids)}, but the model's vocab_size={config.vocab_size}; "
            "the tokenizer beside it belongs to another model"
        )
    longest = config.max_position_embeddings
    if len(ids) + max_new_tokens > longest:
        raise MorError(
            f"prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} are past "
            f"max_position_embeddings={longest}; shorten one of them"
        )
    return torch.tensor([ids])


class StreamPrinter:
    """Prints tokens as they come; bytes of an unfinished character wait for their last token."""

    def __init__(self, tokenizer: Any, recursions: int, *, color: bool) -> None:
        self.tokenizer, self.recursions = tokenizer, recursions
        self.console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
        self.color = color and recursions > 1 and self.console.is_terminal
        self.context: list[int] = []
        self.waiting: list[int] = []
        self.depth = 0

    def begin(self, prompt: str, ids: list[int]) -> None:
        """Print the legend and the prompt, whose ids are ``ids``."""
        self.context = ids[-CONTEXT:]
        if self.color:
            self.console.print(render_terminal([], [], self.recursions))
        self._print(prompt, style="bold")

    def put(self, token: int, depth: int) -> None:
        """Print one token."""
        self.waiting.append(token)
        self.depth = depth
        text = self._text()
        if not text.endswith("\ufffd") or len(self.waiting) >= CONTEXT:
            self._show(text)

    def end(self) -> None:
        """Print what still waits, and finish the line."""
        if self.waiting:
            self._show(self._text())
        self.console.print()

    def _text(self) -> str:
        """What the waiting tokens add to the text."""
        before = self.tokenizer.decode(self.context, skip_special_tokens=True)
        both = self.tokenizer.decode(self.context + self.waiting, skip_special_tokens=True)
        return str(both[len(before) :])

    def _show(self, text: str) -> None:
        self.context = (self.context + self.waiting)[-CONTEXT:]
        self.waiting = []
        if self.color:
            colored = render_terminal([text], [self.depth], self.recursions, legend=False)
            self.console.print(colored, end="")
        else:
            self._print(text)
        self.console.file.flush()

    def _print(self, text: str, style: str | None = None) -> None:
        if self.console.is_terminal:
            self.console.print(printable(text), end="", style=style)  # no token steers a terminal
        else:
            self.console.file.write(text)  # a file gets what was said, tabs and all
