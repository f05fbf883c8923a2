"""What ``serve run mor.server.ray:app`` and a Serve configuration may say."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mor.engine import Engine
from mor.errors import MorError, nearest
from mor.folder.network import Weights
from mor.run_files import DEFAULT_MODEL, MODEL, find_folder
from mor.server.app import MAX_BODY
from mor.server.build import Served, read_template
from mor.server.keys import choose_keys
from mor.server.ray.counts import DOWNSCALE, UPSCALE, Count, Share, parse_count

ELSEWHERE = {
    "host": "the address is that of Ray Serve's proxy: http_options in its configuration",
    "port": "the port is that of Ray Serve's proxy: http_options in its configuration",
    "log_level": "levels are Ray Serve's: logging_config in its configuration",
}
"""Options of ``mor serve`` that are no arguments here, and what stands for them."""


class Settings(BaseModel):
    """Arguments of the application; those that ``mor serve`` has mean the same.

    ``serve run`` gives them as texts, a configuration as values: both are taken.

    Attributes:
        model: a folder that every node has at the same place.
        replicas, autoscale: as ``--replicas`` and ``--autoscale``.
        chat_template: a Jinja file; the node that builds the application reads it.
        cors_origin: one or several.
        fronts: processes that take requests from Serve's proxy.
        cores, gpus: of one replica.
        fingerprint: of the model, where the node that builds the application does not have it.
        api_key: one key or several; one that no command line shows by ``MOR_API_KEY``.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path = DEFAULT_MODEL
    replicas: int | None = None
    autoscale: str | None = None
    upscale_seconds: float = Field(UPSCALE, ge=0)
    downscale_seconds: float = Field(DOWNSCALE, ge=0)
    fronts: int = Field(1, ge=1)
    cores: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    fingerprint: str | None = None
    served_model_name: str | None = None
    api_key: str | list[str] | None = None
    chat_template: Path | None = None
    cors_origin: str | list[str] | None = None
    max_restarts: int = Field(3, ge=0)
    max_num_seqs: int = Field(32, ge=1)
    max_waiting: int = Field(128, ge=0)
    max_model_len: int | None = None
    max_body_bytes: int = Field(MAX_BODY, ge=1024)
    memory_fraction: float = 0.5
    num_pages: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    dtype: Weights = "float32"
    attention: str = "auto"
    drain_seconds: float = Field(30.0, ge=0)
    playground: bool = True
    max_residents: int | None = None
    max_depth: int | None = None
    prefill_chunk: int = 64
    min_gather: int | None = None
    page_size: int = 16
    prefix_caching: bool = True
    speculate: int = 0
    draft_depth: int = 1
    speculate_always: bool = False

    def count(self) -> Count:
        """Of replicas; 1 where nothing is said.

        Raises:
            MorError: see :func:`mor.server.ray.counts.parse_count`.
        """
        pace = self.upscale_seconds, self.downscale_seconds
        return parse_count(self.replicas, self.autoscale, *pace) or Count(1, 1, 1, *pace)

    def share(self) -> Share:
        """What one replica gets."""
        return Share(self.cores, self.gpus)

    def served(self) -> Served:
        """The same for the server.

        Raises:
            MorError: a key that no client could send.
        """
        folder = self.model.resolve()
        name = folder.parent.name if folder.name == MODEL else folder.name
        known = set(inspect.signature(Engine).parameters) - {"model"}
        options = {name: getattr(self, name) for name in Settings.model_fields if name in known}
        template = None if self.chat_template is None else read_template(self.chat_template)
        return Served(
            find_folder(self.model).resolve(),  # replicas live elsewhere
            name if self.served_model_name is None else self.served_model_name,
            api_keys=choose_keys(_several(self.api_key), os.environ),
            max_waiting=self.max_waiting,
            max_body=self.max_body_bytes,
            max_restarts=self.max_restarts,
            chat_template=template,
            template_from=None if template is None else str(self.chat_template),
            playground=self.playground,
            cors_origins=tuple(_several(self.cors_origin) or ()),
            options=options,
            dtype=self.dtype,
        )


def _several(given: str | list[str] | None) -> list[str] | None:
    return [given] if isinstance(given, str) else given


def read_settings(args: dict[str, Any]) -> Settings:
    """``args`` as settings.

    Raises:
        MorError: one of them is unknown or wrong.
    """
    try:
        return Settings(**args)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            if name in ELSEWHERE:
                raise MorError(
                    f"{name} is no argument of mor.server.ray:app; {ELSEWHERE[name]}"
                ) from None
            close = nearest(name, Settings.model_fields)
            hint = (
                f"did you mean {close}?" if close else f"known: {', '.join(Settings.model_fields)}"
            )
            raise MorError(f"{name} is no argument of mor.server.ray:app; {hint}") from None
        raise MorError(f"{name}={first['input']!r}: {first['msg']}") from None
