"""``mor serve``: an OpenAI-compatible server, with a playground at ``/``."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from mor.checks import check_choice
from mor.engine.opening import open_servable
from mor.errors import MorError, missing_package
from mor.folder.config import load_config
from mor.folder.network import Weights
from mor.run_files import DEFAULT_MODEL, MODEL

if TYPE_CHECKING:
    from mor.server.build import Served
    from mor.server.ray.counts import Count

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def serve(
    model: Annotated[
        Path, typer.Argument(help="a model folder or a run folder; default one that ships")
    ] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="0.0.0.0: reachable from elsewhere")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    replicas: Annotated[
        int | None,
        typer.Option(help="engines, each in a process of its own (Ray Serve); docs/replicas.md"),
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option(help="MIN:MAX replicas, as many as the load asks for")
    ] = None,
    upscale_seconds: Annotated[
        float, typer.Option(min=0.0, help="of more load before another replica starts")
    ] = 10.0,
    downscale_seconds: Annotated[
        float, typer.Option(min=0.0, help="of less load before a replica goes")
    ] = 120.0,
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
    max_num_seqs: Annotated[
        int, typer.Option(min=1, max=65536, help="new tokens in one pass")
    ] = 32,
    max_residents: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 20, help="completions with pages; default 2 x max-num-seqs"),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="completions that may wait; more are answered 429")
    ] = 128,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of prompt and answer; default the model's")
    ] = None,
    max_depth: Annotated[int | None, typer.Option(min=1, help="depth cap for all")] = None,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, max=1 << 20, help="prompt tokens in one pass")
    ] = 64,
    min_gather: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 20, help="tokens that wait for the coda; docs/engine.md"),
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
    speculate: Annotated[
        int, typer.Option(min=0, max=1024, help="tokens to guess at a low depth; docs/engine.md")
    ] = 0,
    draft_depth: Annotated[int, typer.Option(min=1, help="recursions that a guess may take")] = 1,
    speculate_always: Annotated[
        bool, typer.Option("--speculate-always", help="also while guesses do not pay")
    ] = False,
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
    replicas: int | None,
    autoscale: str | None,
    upscale_seconds: float,
    downscale_seconds: float,
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
    dtype: Any,
    **options: Any,
) -> None:
    """All that can be wrong is looked at before the model is loaded, which may take minutes."""
    try:
        from mor.server.build import Served, read_template
        from mor.server.keys import choose_keys
        from mor.server.ray.counts import parse_count
    except ModuleNotFoundError as error:
        raise missing_package("mor serve needs", str(error.name), "serve") from None
    check_choice("log_level", log_level, LOG_LEVELS)
    if load_config(model).modality != "text":
        texts = {"replicas": replicas, "autoscale": autoscale, "chat_template": chat_template}
        refuse_text_options(options | texts | {"max_restarts": max_restarts})
        _serve_classifier(
            model, choose_model_name(model) if served_model_name is None else served_model_name,
            host, port, choose_keys(api_key, os.environ), max_waiting=max_waiting,
            max_body=max_body_bytes, drain_seconds=drain_seconds, log_level=log_level,
            with_playground=playground, cors_origins=cors_origin or (), dtype=dtype,
        )  # fmt: skip
        return
    served = Served(
        model,
        choose_model_name(model) if served_model_name is None else served_model_name,
        api_keys=choose_keys(api_key, os.environ),
        max_waiting=max_waiting,
        max_body=max_body_bytes,
        max_restarts=max_restarts,
        chat_template=None if chat_template is None else read_template(chat_template),
        template_from=None if chat_template is None else str(chat_template),
        playground=playground,
        cors_origins=tuple(cors_origin or ()),
        options=options,
        dtype=dtype,
    )
    count = parse_count(replicas, autoscale, upscale_seconds, downscale_seconds)
    if count is not None:
        _serve_replicas(served, count, host, port, drain_seconds, log_level)
        return
    checked = served.check()
    _serve_made(
        lambda: served.application(open_servable(model, dtype), checked),
        host, port, drain_seconds, log_level,
    )  # fmt: skip


def _serve_made(
    make: Callable[[], Any], host: str, port: int, drain_seconds: float, log_level: str
) -> None:
    """Serve an application that is made, with its model, once the port is ours."""
    from mor.server import make_server
    from mor.server.serve import serve_on
    from mor.server.sockets import open_sockets

    sockets = open_sockets(host, port)
    try:
        server = make_server(make(), host, port, drain_seconds=drain_seconds, log_level=log_level)
        # What there is by now stays. Walking over it again and again would cost a server of a small
        # model a fifth of its Python.
        gc.freeze()
        serve_on(server, sockets, host, port)
    finally:
        for one in sockets:
            one.close()


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
    dtype: str,
    **options: Any,
) -> None:
    """A model of images or sounds.

    Raises:
        MorError: a type of weights that is none, or what stops any server.
    """
    from mor.hf.load import load_media_model
    from mor.hf.load_media import load_processor
    from mor.server.classifier import Classifier
    from mor.server.classify import create_classifier_app

    check_choice("dtype", dtype, Weights)
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def make() -> Any:
        loaded: Any = load_media_model(model, weights)
        loaded = loaded.cuda() if torch.cuda.is_available() else loaded
        classifier = Classifier(loaded, load_processor(model), max_waiting)
        return create_classifier_app(classifier, name, api_keys=keys, **options)

    _serve_made(make, host, port, drain_seconds, log_level)


def refuse_text_options(given: dict[str, Any]) -> None:
    """Refuse options of the engine that writes text where a model of images or sounds is served.

    Args:
        given: options of ``mor serve`` by name, as they were given or by default.

    Raises:
        MorError: naming the first that is not its default.
    """
    parameters = inspect.signature(serve).parameters
    for name, value in given.items():
        if value != parameters[name].default:
            option = name.replace("_", "-")
            raise MorError(
                f"{name}={str(value)!r}: --{option} is of models that write text; a model of "
                "images or sounds is served by one process without it, so leave it out"
            )


def _serve_replicas(
    served: Served, count: Count, host: str, port: int, drain_seconds: float, log_level: str
) -> None:
    from mor.server.ray.counts import set_ray_defaults

    set_ray_defaults()
    try:
        from mor.server.ray.launch import run_replicas
    except ModuleNotFoundError as error:
        raise missing_package("mor serve --replicas needs", str(error.name), "ray") from None
    run_replicas(served, count, host, port, drain_seconds=drain_seconds, log_level=log_level)


def choose_model_name(model: Path) -> str:
    """What a model is called: its folder, or the run's where the folder is its ``model``."""
    folder = model.resolve()
    return folder.parent.name if folder.name == MODEL else folder.name
