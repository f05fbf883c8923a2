"""``mor serve``: an OpenAI-compatible server, with a playground at ``/``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from mor.cli.common import open_model
from mor.errors import MorError, missing_package
from mor.eval.levels import load_levels
from mor.hf.load import load_tokenizer
from mor.run_files import MODEL


def serve(
    model: Annotated[Path, typer.Argument(help="a model folder or a run folder")],
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from elsewhere")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="MOR_API_KEY", help="clients must send it; may be given repeatedly"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="the name clients use; default the folder's")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file in place of the tokenizer's chat template")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="new tokens in one pass")] = 32,
    max_residents: Annotated[
        int | None, typer.Option(min=1, help="completions with pages; default 2 x max-num-seqs")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="completions that may wait; more are answered 429")
    ] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompt and answer; default the model's")
    ] = None,
    max_depth: Annotated[int | None, typer.Option(min=1, help="depth cap for all")] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="prompt tokens in one pass")] = 64,
    min_gather: Annotated[
        int | None, typer.Option(min=1, help="tokens that wait for the coda; docs/engine.md")
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="tokens per page")] = 16,
    num_pages: Annotated[int | None, typer.Option(min=1, help="pages in the pool")] = None,
    memory_fraction: Annotated[
        float, typer.Option(help="share of the free memory that the pool may take")
    ] = 0.5,
    quantization: Annotated[
        str | None, typer.Option(help="int8: weights of 8 bits, on the CPU; docs/engine.md")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024)] = 4 << 20,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="time to finish after SIGTERM")
    ] = 30.0,
    playground: Annotated[bool, typer.Option(help="the page at /")] = True,
    log_level: Annotated[str, typer.Option(help="of uvicorn")] = "info",
) -> None:
    """Serve MODEL over HTTP: /v1/completions, /v1/chat/completions, /metrics, a page at /."""
    try:
        from mor.server import create_app, make_server
    except ModuleNotFoundError as error:
        raise missing_package("mor serve needs", str(error.name), "serve") from None
    levels = ("critical", "error", "warning", "info", "debug", "trace")
    if log_level not in levels:
        raise MorError(f"log_level={log_level!r} is not known; use one of: {', '.join(levels)}")
    template = None if chat_template is None else _read(chat_template)
    from mor.engine import Engine

    tokenizer = load_tokenizer(model)
    engine = Engine(
        open_model(model),
        tokenizer,
        max_num_seqs=max_num_seqs,
        max_residents=max_residents,
        min_gather=min_gather,
        prefill_chunk=prefill_chunk,
        page_size=page_size,
        num_pages=num_pages,
        memory_fraction=memory_fraction,
        max_model_len=max_model_len,
        max_depth=max_depth,
        quantization=cast("Any", quantization),  # the engine checks it
    )
    application = create_app(
        engine,
        served_model_name or choose_model_name(model),
        api_keys=api_key or (),
        max_waiting=max_waiting,
        max_body=max_body_bytes,
        chat_template=template,
        levels=load_levels(model),
        with_playground=playground,
    )
    make_server(application, host, port, drain_seconds=drain_seconds, log_level=log_level).run()


def choose_model_name(model: Path) -> str:
    """What a model is called: its folder, or the run's where the folder is its ``model``."""
    folder = model.resolve()
    return folder.parent.name if folder.name == MODEL else folder.name


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MorError(f"chat_template={path} cannot be read: {error}") from None
