"""What an engine needs of a language model: the network, and which tokens end a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mor.config import MoRConfig
from mor.model.model import MoRModel


class Servable(Protocol):
    """A :class:`mor.hf.MoRForCausalLM`, or a :class:`ServedNetwork`."""

    model: MoRModel

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""

    @property
    def config(self) -> MoRConfig:
        """The network's."""

    @property
    def generation_config(self) -> Any:
        """Transformers' ``GenerationConfig``; None where there is none."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""


@dataclass
class ServedNetwork:
    """A network as an engine takes it, without a model of Transformers around it.

    Attributes:
        model: the network, in evaluation mode.
        generation_config: Transformers' ``GenerationConfig``; None where there is none.
    """

    model: MoRModel
    generation_config: Any = None

    @property
    def training(self) -> bool:
        """Whether the network is in training mode."""
        return self.model.training

    @property
    def config(self) -> MoRConfig:
        """The network's."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device
