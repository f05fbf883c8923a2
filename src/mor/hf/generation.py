"""``generate`` with a cache per depth, by the name that the installed Transformers has for it."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationMixin

from mor.config import MoRConfig
from mor.hf.arguments import CACHE_NAME, ArgumentError, one_cache
from mor.hf.cache import MoRCache

# What grows and can be cropped, as ours does; older versions' assistants ask for the second.
_PLAIN_CACHES = ("dynamic", "dynamic_full")


class DepthGeneration(GenerationMixin):
    """Transformers' generation over a :class:`MoRCache`."""

    config: MoRConfig

    # With the signature of the original: generate() reads off it what a model takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in every model, with the cache by both names: PEFT's prompts look for the old one.

        Each token decides for itself in training mode too, unless ``routing`` says otherwise:
        training's rule compares the tokens of one call, and takes note of them.
        """
        prepare: Any = super().prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(*args, **kwargs)
        if inputs.get("routing") is None:
            inputs["routing"] = "causal"
        found = inputs.get(CACHE_NAME)
        return inputs if found is None else inputs | {"past_key_values": found}

    # With the signature of the original: PEFT and pipelines read it.
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in every model, with a :class:`MoRCache` unless one is given or none is wanted.

        An empty ``DynamicCache`` becomes a :class:`MoRCache` (the same object).

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
        given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
        cache = one_cache(given[0], given[1], self.config)
        if cache is None and kwargs.get("use_cache", settings.use_cache) is not False:
            cache = MoRCache(self.config)
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        generate: Any = super().generate
        return generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: :meth:`init_continuous_batching` says why.

        Raises:
            ArgumentError: always.
        """
        raise _no_batching("generate_batch")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: Transformers' pages know layers and no depths; :mod:`mor.engine` does.

        Raises:
            ArgumentError: always.
        """
        raise _no_batching("init_continuous_batching")

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Not available: :meth:`init_continuous_batching` says why.

        Raises:
            ArgumentError: always.
        """
        raise _no_batching("continuous_batching_context_manager")


def _no_batching(name: str) -> ArgumentError:
    return ArgumentError(
        f"{name} is not available: Transformers' continuous batching keeps pages per layer and MoR "
        "caches per depth; use generate with a padded batch, or mor.engine.Engine, which batches "
        "continuously"
    )
