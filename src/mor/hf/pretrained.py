"""What every class of ours is to Transformers: made, saved and loaded in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mor.config import ConfigError, MoRConfig
from mor.hf.arguments import CACHE_NAMES
from mor.model.layers import RMSNorm
from mor.model.model import MoRModel
from mor.model.relaxation import Relaxation
from mor.model.routers import BoundaryRouter, TokenChoiceRouter
from mor.model.routers.net import RouterNet
from mor.model.wide import StaysWide
from mor.ops.alignment import align_weights

_PLURAL = {"modality": "modalities", "head_type": "head_types"}


class MoRPreTrainedModel(StaysWide, PreTrainedModel):  # type: ignore[misc]  # `to`, `half`
    """What Transformers needs to know to make, save and load the model."""

    config: MoRConfig
    config_class = MoRConfig
    model: MoRModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    # Routers compare float32 numbers with float32 boundaries in every training dtype.
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012

    # The configurations that a class is for: what its tokens are made of, and its heads.
    modalities: tuple[str, ...] = ("text",)
    head_types: tuple[str, ...] = ("vocabulary",)

    def __init__(self, config: MoRConfig, *args: Any, **kwargs: Any) -> None:
        for name in ("modality", "head_type"):
            value, right = getattr(config, name), getattr(self, _PLURAL[name])
            if value not in right:
                raise ConfigError(
                    f"{name}={value!r} is not for {type(self).__name__}, which takes "
                    f"{' or '.join(map(repr, right))}"
                )
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', the weights in aligned memory: see :mod:`mor.ops.alignment`."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        align_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As PyTorch's; tensors that are taken over (``assign``) are laid in aligned memory."""
        found = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if assign:
            align_weights(self)
        return found

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.model.embed_tokens = value

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, initializer_range) for matrices, ones for norms, constants for routers."""
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, 0.0, std)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
            # A row of a loaded embedding no longer carries the mark that keeps it from being reset.
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and not loaded:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.zeros_(module.running_mean)
            nn.init.ones_(module.running_var)
        elif isinstance(module, (Relaxation, RouterNet)):
            module.reset(std)
        elif isinstance(module, BoundaryRouter):
            nn.init.constant_(module.boundary, module.half_rule)
            nn.init.zeros_(module.boundary_steps)
        elif isinstance(module, TokenChoiceRouter):
            nn.init.zeros_(module.bias)
