"""``generate`` with a cache per depth, by the name that the installed Transformers has for it."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationMixin

from mor.config import MoRConfig
from mor.hf.arguments import CACHE_NAME, one_cache
from mor.hf.cache import MoRCache

# What grows and can be cropped, as ours does; older versions' assistants ask for the second.
_PLAIN_CACHES = ("dynamic", "dynamic_full")


class DepthGeneration(GenerationMixin):
    """Transformers' generation over a :class:`MoRCache`."""

    config: MoRConfig

    # With the signature of the original: generate() reads off it what a model takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in every model, with the cache by both names: PEFT's prompts look for the old one."""
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        found = inputs.get(CACHE_NAME)
        return inputs if found is None else inputs | {"past_key_values": found}

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, *_PLAIN_CACHES):
            raise ValueError(
                f"cache_implementation={kind!r} is not available: MoR caches per depth; "
                "leave it out"
            )
        given = one_cache(*(model_kwargs.pop(name, None) for name in ("past_key_values", "cache")))
        if given is not None:
            model_kwargs[CACHE_NAME] = given
            generation_config.cache_implementation = None
            # It notes that the cache is the caller's.
            prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
            prepare(generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = MoRCache(self.config)
