"""generate(cache_implementation="gear", cache_config={"bits": 2}): teach transformers the name.

transformers keeps the names that it knows in a tuple and makes the cache in one method; there is no
registry. The method is wrapped: for our name it runs as for the default cache, so that whatever
rules out a cache still does, and the cache that it made is replaced. Where no cache is said, a
model whose plan has settings for it (`--context`) gets those; cache_implementation="dynamic" is the
full cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

NAME = "gear"
_KNOWS = "_knows_gear"


def teach_generate() -> None:
    """Have generate() take cache_implementation="gear"; a second call does nothing."""
    from transformers.generation import configuration_utils
    from transformers.generation.utils import GenerationMixin

    stock = GenerationMixin._prepare_cache_for_generation
    if hasattr(stock, _KNOWS):
        return
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS += (NAME,)

    @wraps(stock)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        said = generation_config.cache_implementation
        is_planned = said is None and not _caches(model_kwargs) and _has_planned_cache(self)
        if is_planned:
            answer = stock(self, generation_config, model_kwargs, *args, **kwargs)
            _replace(model_kwargs, lambda: _gear_cache().of(self))
            return answer
        if said != NAME:
            return stock(self, generation_config, model_kwargs, *args, **kwargs)
        if self.config.is_encoder_decoder:
            raise ValueError(f"cache_implementation={NAME!r} takes decoders, no encoder-decoder")
        _refuse_two(model_kwargs)
        as_default = copy.copy(generation_config)
        as_default.cache_implementation = None
        answer = stock(self, as_default, model_kwargs, *args, **kwargs)
        settings = generation_config.cache_config or {}
        _replace(model_kwargs, lambda: _with_settings(self.config, settings))
        return answer

    setattr(prepare, _KNOWS, True)
    GenerationMixin._prepare_cache_for_generation = prepare


def _refuse_two(model_kwargs: dict[str, Any]) -> None:
    if _caches(model_kwargs):
        raise ValueError(
            f"give either a cache or cache_implementation={NAME!r}, not both; GearCache is a cache"
        )


def _caches(model_kwargs: dict[str, Any]) -> list[str]:
    """Return the names of arguments that are caches."""
    from transformers.cache_utils import Cache

    return [name for name, value in model_kwargs.items() if isinstance(value, Cache)]


def _has_planned_cache(model: Any) -> bool:
    if getattr(model, "hf_quantizer", None) is None:  # most models: nothing is imported
        return False
    from .cache import planned

    return planned(model) is not None


def _gear_cache() -> Any:
    from .cache import GearCache

    return GearCache


def _with_settings(config: Any, settings: dict[str, Any]) -> Any:
    try:
        return _gear_cache()(config, **settings)
    except TypeError as error:
        raise TypeError(
            "cache_config takes bits, group_size, rank, outliers, buffer and levels, got "
            f"{settings}"
        ) from error


def _replace(model_kwargs: dict[str, Any], make: Callable[[], Any]) -> None:
    """Put a GearCache where the default cache is; its argument's name depends on the version."""
    from transformers.cache_utils import DynamicCache

    for name in _caches(model_kwargs):
        if isinstance(model_kwargs[name], DynamicCache):
            model_kwargs[name] = make()
