"""generate(cache_implementation="gear", cache_config={"bits": 2}): teach transformers the name.

transformers keeps the names that it knows in a tuple and makes the cache in one method; there is no
registry. The method is wrapped: for our name it runs as for the default cache, so that whatever
rules out a cache still does, and the cache that it made is replaced.
"""

from __future__ import annotations

import copy
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
        if generation_config.cache_implementation != NAME:
            return stock(self, generation_config, model_kwargs, *args, **kwargs)
        if self.config.is_encoder_decoder:
            raise ValueError(f"cache_implementation={NAME!r} takes decoders, no encoder-decoder")
        _refuse_two(model_kwargs)
        as_default = copy.copy(generation_config)
        as_default.cache_implementation = None
        answer = stock(self, as_default, model_kwargs, *args, **kwargs)
        _replace(model_kwargs, self.config, generation_config.cache_config or {})
        return answer

    setattr(prepare, _KNOWS, True)
    GenerationMixin._prepare_cache_for_generation = prepare


def _refuse_two(model_kwargs: dict[str, Any]) -> None:
    from transformers.cache_utils import Cache

    if any(isinstance(value, Cache) for value in model_kwargs.values()):
        raise ValueError(
            f"give either a cache or cache_implementation={NAME!r}, not both; GearCache is a cache"
        )


def _replace(model_kwargs: dict[str, Any], config: Any, settings: dict[str, Any]) -> None:
    """Put a GearCache where the default cache is; its argument's name depends on the version."""
    from transformers.cache_utils import DynamicCache

    from .cache import GearCache

    for name, value in model_kwargs.items():
        if isinstance(value, DynamicCache):
            try:
                model_kwargs[name] = GearCache(config, **settings)
            except TypeError as error:
                raise TypeError(
                    "cache_config takes bits, group_size, rank, outliers and buffer, got "
                    f"{settings}"
                ) from error
