"""What ``serve run mor.server.ray:app`` and a Serve configuration may say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mor.errors import MorError, nearest
from mor.run_files import DEFAULT_MODEL, MODEL, find_folder
from mor.server.app import MAX_BODY
from mor.server.build import Served
from mor.server.keys import choose_keys
from mor.server.ray.counts import Count, Share, parse_count


class Settings(BaseModel):
    """Arguments of the application; those that ``mor serve`` has mean the same.

    ``serve run`` gives them as texts, a configuration as values: both are taken.

    Attributes:
        model: a folder that every node has at the same place.
        replicas, autoscale: as ``--replicas`` and ``--autoscale``.
        fronts: processes that take requests from Serve's proxy.
        cores, gpus: of one replica.
        fingerprint: of the model, where the node that builds the application does not have it.
        api_key: one key; more of them, or none on the command line, by ``MOR_API_KEY``.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path = DEFAULT_MODEL
    replicas: int | None = None
    autoscale: str | None = None
    fronts: int = Field(1, ge=1)
    cores: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    fingerprint: str | None = None
    served_model_name: str | None = None
    api_key: str | None = None
    max_num_seqs: int = Field(32, ge=1)
    max_waiting: int = Field(128, ge=0)
    max_model_len: int | None = None
    max_body_bytes: int = Field(MAX_BODY, ge=1024)
    memory_fraction: float = 0.5
    num_pages: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
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
        return parse_count(self.replicas, self.autoscale) or Count(1, 1, 1)

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
        options = {
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "memory_fraction": self.memory_fraction,
            "num_pages": self.num_pages,
            "quantization": self.quantization,
            "kv_cache_dtype": self.kv_cache_dtype,
            "max_residents": self.max_residents,
            "max_depth": self.max_depth,
            "prefill_chunk": self.prefill_chunk,
            "min_gather": self.min_gather,
            "page_size": self.page_size,
            "prefix_caching": self.prefix_caching,
            "speculate": self.speculate,
            "draft_depth": self.draft_depth,
            "speculate_always": self.speculate_always,
        }
        return Served(
            find_folder(self.model).resolve(),  # replicas live elsewhere
            name if self.served_model_name is None else self.served_model_name,
            api_keys=choose_keys(None if self.api_key is None else [self.api_key], os.environ),
            max_waiting=self.max_waiting,
            max_body=self.max_body_bytes,
            playground=self.playground,
            options=options,
        )


def read_settings(args: dict[str, Any]) -> Settings:
    """``args`` as settings.

    Raises:
        MorError: one of them is unknown or wrong.
    """
    try:
        return Settings(**args)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            close = nearest(name, Settings.model_fields)
            hint = (
                f"did you mean {close}?" if close else f"known: {', '.join(Settings.model_fields)}"
            )
            raise MorError(f"{name} is no argument of mor.server.ray:app; {hint}") from None
        raise MorError(f"{name}={first['input']!r}: {first['msg']}") from None
