"""``mor serve``: an OpenAI-compatible server, with a playground at ``/``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mor.checks import check_choice
from mor.cli.common import Weights, open_model
from mor.engine.options import check_options
from mor.errors import MorError, missing_package
from mor.eval.levels import load_levels
from mor.hf.load import load_config, load_media_model, load_tokenizer
from mor.hf.load_media import load_processor
from mor.hf.modeling import MoRForCausalLM
from mor.hf.vision_language import MoRForConditionalGeneration
from mor.run_files import DEFAULT_MODEL, MODEL

if TYPE_CHECKING:
    from mor.server.images import ImageReader

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def serve(
    model: Annotated[
        Path, typer.Argument(help="a model folder or a run folder; default one that ships")
    ] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from elsewhere")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="clients must send it; may be given repeatedly; without it the one key in the "
            "variable MOR_API_KEY"
        ),
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
    kv_cache_dtype: Annotated[
        str, typer.Option(help="of keys and values: auto, bfloat16, int8 or fp8; docs/engine.md")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="of the weights: float32, or bfloat16 (for GPUs)")
    ] = "float32",
    attention: Annotated[
        str, typer.Option(help="form of attention over pages; docs/engine.md names them")
    ] = "auto",
    prefix_caching: Annotated[
        bool, typer.Option(help="share pages between requests that begin alike")
    ] = True,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="of the engine after failures, within a minute")
    ] = 3,
    max_body_bytes: Annotated[int, typer.Option(min=1024)] = 4 << 20,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="time to finish after SIGTERM")
    ] = 30.0,
    playground: Annotated[bool, typer.Option(help="the page at /")] = True,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="pages of this origin may ask; * for all; may be given repeatedly"),
    ] = None,
    log_level: Annotated[str, typer.Option(help="of uvicorn")] = "info",
) -> None:
    """Serve MODEL over HTTP: /v1/completions, /v1/chat/completions, /metrics, a page at /."""
    try:
        _serve(**locals())
    except KeyboardInterrupt:  # a server that runs drains instead
        typer.echo("stopped before the model was loaded", err=True)
        raise typer.Exit(130) from None


def _serve(
    model: Path,
    *,
    host: str,
    port: int,
    api_key: list[str] | None,
    served_model_name: str | None,
    chat_template: Path | None,
    max_waiting: int,
    max_restarts: int,
    max_body_bytes: int,
    drain_seconds: float,
    playground: bool,
    cors_origin: list[str] | None,
    log_level: str,
    dtype: str,
    **options: Any,
) -> None:
    """All that can be wrong is looked at before the model is loaded, which may take minutes."""
    try:
        from mor.server import create_app, make_server
        from mor.server.app import LEAST_TOKENS
        from mor.server.crossing import check_origins
        from mor.server.keys import choose_keys
        from mor.server.sockets import open_sockets, refusal
        from mor.server.templates import check_template
    except ModuleNotFoundError as error:
        raise missing_package("mor serve needs", str(error.name), "serve") from None
    check_choice("log_level", log_level, LOG_LEVELS)
    check_choice("dtype", dtype, Weights)
    keys = choose_keys(api_key, os.environ)
    check_origins(cors_origin or ())
    name = choose_model_name(model) if served_model_name is None else served_model_name
    if not name.strip():
        raise MorError("served_model_name is empty; leave it out or give a name")
    template = None if chat_template is None else _read(chat_template)
    config = load_config(model)
    if config.modality != "text":
        _serve_classifier(
            model, name, host, port, keys, max_waiting=max_waiting, max_body=max_body_bytes,
            drain_seconds=drain_seconds, log_level=log_level, with_playground=playground,
            cors_origins=cors_origin or (),
        )  # fmt: skip
        return
    levels = load_levels(model)
    check_options(config, least=LEAST_TOKENS, **options)
    if levels is not None:
        levels.check_depths(config.num_recursions)
    tokenizer = load_tokenizer(model)
    whose = f"the tokenizer of {model}" if chat_template is None else str(chat_template)
    template = check_template(tokenizer, template, f"the chat template of {whose}")
    sockets = open_sockets(host, port)
    from mor.engine import Engine

    try:
        opened = open_model(model, dtype)
        application = create_app(
            Engine(opened, tokenizer, release_weights=True, **options),
            name,
            images=_image_reader(opened, model),
            api_keys=keys,
            max_waiting=max_waiting,
            max_body=max_body_bytes,
            max_restarts=max_restarts,
            chat_template=template,
            levels=levels,
            with_playground=playground,
            cors_origins=cors_origin or (),
        )
        server = make_server(
            application, host, port, drain_seconds=drain_seconds, log_level=log_level
        )
        try:
            server.run(sockets)
        except OSError as error:  # another that began at the same time was ready first
            raise refusal(host, port, error) from None
    finally:
        for one in sockets:
            one.close()


def _image_reader(opened: MoRForCausalLM, folder: Path) -> ImageReader | None:
    """What reads images for the model; None where it takes none."""
    if not isinstance(opened, MoRForConditionalGeneration):
        return None
    from mor.server.images import ImageReader

    return ImageReader(opened, load_processor(folder))


def _serve_classifier(
    model: Path,
    name: str,
    host: str,
    port: int,
    keys: Sequence[str],
    *,
    max_waiting: int,
    drain_seconds: float,
    log_level: str,
    **options: Any,
) -> None:
    """A model of images or sounds."""
    from mor.server import make_server
    from mor.server.classifier import Classifier
    from mor.server.classify import create_classifier_app
    from mor.server.sockets import open_sockets, refusal

    sockets = open_sockets(host, port)
    try:
        classifier = Classifier(load_media_model(model), load_processor(model), max_waiting)
        application = create_classifier_app(classifier, name, api_keys=keys, **options)
        server = make_server(
            application, host, port, drain_seconds=drain_seconds, log_level=log_level
        )
        try:
            server.run(sockets)
        except OSError as error:  # another that began at the same time was ready first
            raise refusal(host, port, error) from None
    finally:
        for one in sockets:
            one.close()


def choose_model_name(model: Path) -> str:
    """What a model is called: its folder, or the run's where the folder is its ``model``."""
    folder = model.resolve()
    return folder.parent.name if folder.name == MODEL else folder.name


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MorError(f"chat_template={path} cannot be read: {error}") from None
