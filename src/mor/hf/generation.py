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
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in every model, with the cache by both names: PEFT's prompts look for the old one."""
        prepare: Any = super().prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        found = inputs.get(CACHE_NAME)
        return inputs if found is None else inputs | {"past_key_values": found}

    # With the signature of the original: PEFT and pipelines read it.
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in every model, with a :class:`MoRCache` unless one is given or none is wanted.

        Raises:
            ValueError: a cache of another kind is asked for or given.
        """
        settings = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        settings = settings or self.generation_config
        kind = kwargs.pop("cache_implementation", settings.cache_implementation)
        if kind not in (None, *_PLAIN_CACHES):
            raise ValueError(
                f"cache_implementation={kind!r} is not available: MoR caches per depth; "
                "leave it out"
            )
        if settings.cache_implementation is not None:
            kwargs["cache_implementation"] = None
        cache = one_cache(*(kwargs.pop(name, None) for name in ("past_key_values", "cache")))
        if cache is None and kwargs.get("use_cache", settings.use_cache) is not False:
            cache = MoRCache(self.config)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        generate: Any = super().generate
        return generate(*args, **kwargs)
