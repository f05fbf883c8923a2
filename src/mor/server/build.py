"""What a server is asked to be, as values: checked before a model loads, built in any process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from mor.checks import check_choice
from mor.engine import Engine
from mor.engine.options import check_options
from mor.errors import MorError
from mor.folder.config import load_config
from mor.folder.levels import Levels, load_levels
from mor.folder.network import Weights
from mor.folder.tokenizer import load_tokenizer
from mor.model.servable import Servable
from mor.server.app import LEAST_TOKENS, MAX_BODY, create_app
from mor.server.crossing import check_origins
from mor.server.images import Reader
from mor.server.templates import check_template


def read_template(path: Path) -> str:
    """The text of a Jinja file.

    Raises:
        MorError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MorError(f"chat_template={path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Checked:
    """What :meth:`Served.check` has read on the way.

    Attributes:
        tokenizer: the model's.
        template: of chats, working; None where there is none.
        levels: calibrated capacities; None where there are none.
    """

    tokenizer: Any
    template: str | None
    levels: Levels | None


@dataclass(frozen=True)
class Served:
    """A model and how it is served; plain values, which another process may be sent.

    Attributes:
        model: a model folder or a run folder.
        name: what clients call it.
        api_keys, max_waiting, max_body, max_restarts, playground, cors_origins: see
            :func:`mor.server.create_app`.
        chat_template: Jinja text in place of the tokenizer's own.
        template_from: where that came from, for messages.
        options: of :class:`mor.engine.Engine`.
        dtype: of the weights.
        created: what the model's card says, Unix seconds.
    """

    model: Path
    name: str
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 128
    max_body: int = MAX_BODY
    max_restarts: int = 3
    chat_template: str | None = None
    template_from: str | None = None
    playground: bool = True
    cors_origins: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: Weights = "float32"
    created: int = field(default_factory=lambda: int(time.time()))

    def check(self) -> Checked:
        """Look at all that can be wrong, without the weights.

        Raises:
            MorError: no model, an option that does not suit it, a template that does not work.
        """
        check_choice("dtype", self.dtype, Weights)
        check_origins(self.cors_origins)
        if not self.name.strip():
            raise MorError("served_model_name is empty; leave it out or give a name")
        config, levels = load_config(self.model), load_levels(self.model)
        check_options(config, least=LEAST_TOKENS, **self.options)
        if levels is not None:
            levels.check_depths(config.num_recursions)
        tokenizer = load_tokenizer(self.model)
        whose = self.template_from or f"the tokenizer of {self.model}"
        template = check_template(tokenizer, self.chat_template, f"the chat template of {whose}")
        return Checked(tokenizer, template, levels)

    def of_a_replica(self) -> Served:
        """The same behind a front: keys and other origins are looked at there, once."""
        return replace(self, api_keys=(), cors_origins=())

    def application(self, model: Servable, checked: Checked) -> FastAPI:
        """The application around an engine of its own for ``model``, which then belongs to it.

        Raises:
            MorError: see :func:`mor.server.create_app`.
        """
        app = create_app(
            Engine(model, checked.tokenizer, release_weights=True, **self.options),
            self.name,
            api_keys=self.api_keys,
            max_waiting=self.max_waiting,
            max_body=self.max_body,
            max_restarts=self.max_restarts,
            chat_template=checked.template,
            levels=checked.levels,
            images=open_reader(model, self.model),
            with_playground=self.playground,
            cors_origins=self.cors_origins,
        )
        app.state.mor.created = self.created
        return app


def open_reader(model: Servable, folder: Path) -> Reader | None:
    """What reads images or sounds for ``model`` of ``folder``; None where it takes none.

    Raises:
        MorError: its processor is missing, damaged, or another model's.
    """
    config = model.config
    if config.media_token_id is None:
        return None
    from mor.server.readers import make_reader  # with modelling code that texts do without

    return make_reader(model, folder)
