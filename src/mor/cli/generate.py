"""``mor generate``: write text, coloured by depth."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import set_seed

from mor.errors import MorError
from mor.hf.generate import generate_with_depths
from mor.hf.load import load_model, load_tokenizer
from mor.report import render_terminal


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(generate)


def generate(
    model: Annotated[Path, typer.Argument(help="a model folder or a run folder")],
    prompt: Annotated[str, typer.Option(help="text to go on from; - reads standard input")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="at most so many")] = 200,
    greedy: Annotated[bool, typer.Option(help="always the likeliest token")] = False,
    temperature: Annotated[float, typer.Option(min=1e-3)] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0: no limit")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="0: off")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01, help="1: none")] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_depth: Annotated[int | None, typer.Option(help="cap on recursions per token")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="go on past the end-of-text token")] = False,
    color: Annotated[bool, typer.Option(help="colour each token by its depth")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Go on from PROMPT, streaming; each token's colour tells how many recursions it cost."""
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_prompt(tokenizer, text, loaded.config, max_new_tokens)
    recursions = loaded.config.num_recursions
    if max_depth is not None and not 1 <= max_depth <= recursions:
        raise MorError(f"max_depth={max_depth} must lie in 1..{recursions}")
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
    printer = StreamPrinter(tokenizer, recursions, color=color, quiet=as_json)
    if not as_json:
        printer.begin(text)
    began = time.perf_counter()
    tokens, depths = generate_with_depths(loaded, ids, printer.put, **options)
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
        f"{len(tokens)} tokens, mean depth {mean:.2f} of {recursions}, "
        f"{len(tokens) / seconds:.1f} tokens/s",
        style="dim",
    )


def encode_prompt(tokenizer: Any, text: str, config: Any, max_new_tokens: int) -> torch.Tensor:
    """Prompt ids [1, T]; an empty prompt is the beginning-of-text token.

    Raises:
        MorError: the prompt and what is to follow do not fit the model's maximum.
    """
    ids = tokenizer(text, return_tensors="pt").input_ids if text else torch.zeros(1, 0).long()
    if ids.shape[1] == 0:
        start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
        if start is None:
            raise MorError("prompt is empty and the model has no beginning-of-text token")
        ids = torch.tensor([[start]])
    longest = config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > longest:
        raise MorError(
            f"prompt of {ids.shape[1]} tokens and max_new_tokens={max_new_tokens} are past "
            f"max_position_embeddings={longest}; shorten one of them"
        )
    return ids


class StreamPrinter:
    """Prints tokens as they come; bytes of an unfinished character wait for their last token."""

    def __init__(self, tokenizer: Any, recursions: int, *, color: bool, quiet: bool) -> None:
        self.tokenizer, self.recursions = tokenizer, recursions
        self.color, self.quiet = color and recursions > 1, quiet
        self.console = Console(highlight=False, soft_wrap=True)
        self.waiting: list[int] = []

    def begin(self, prompt: str) -> None:
        """Print the legend and the prompt."""
        if self.color:
            self.console.print(render_terminal([], [], self.recursions))
        self.console.print(prompt, end="", style="bold", markup=False)

    def put(self, token: int, depth: int) -> None:
        """Print one token."""
        self.waiting.append(token)
        text = self.tokenizer.decode(self.waiting, skip_special_tokens=True)
        if self.quiet or (text.endswith("\ufffd") and len(self.waiting) < 8):
            return
        self.waiting = []
        if self.color:
            self.console.print(self._colored(text, depth), end="")
        else:
            self.console.print(text, end="", markup=False)
        self.console.file.flush()

    def _colored(self, text: str, depth: int) -> Any:
        return render_terminal([text], [depth], self.recursions, legend=False)

    def end(self) -> None:
        """Finish the line."""
        self.console.print()
