"""AutoModel*.from_pretrained(name, size="80MB"): teach transformers the word.

Its config is `EvoPressConfig(size=...)`. Of a model on the Hub, which transformers would download
whole before it asks us, `download` fetches no more than that size takes.
"""

from __future__ import annotations

import copy
import os
from functools import wraps
from typing import Any

_KNOWS = "_knows_size"
# what `download` does not take: transformers then gets the file whole, and reads what it needs
_OF_TRANSFORMERS = ("token", "cache_dir", "local_files_only", "subfolder", "proxies")


def teach_auto_models() -> None:
    """Have every AutoModel class take `size`; a second call does nothing."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = [kind for kind in vars(modeling_auto).values() if isinstance(kind, type)]
    kinds: list[Any] = [kind for kind in found if issubclass(kind, _BaseAutoModelClass)]
    for kind in kinds:
        own = vars(kind).get("from_pretrained")
        if own is not None and not hasattr(own, _KNOWS):
            kind.from_pretrained = _taking_size(own)


def _taking_size(method: Any) -> Any:
    stock = method.__func__

    @wraps(stock)
    def from_pretrained(
        cls: Any, name: Any, *args: Any, size: str | int | None = None, **kwargs: Any
    ) -> Any:
        if size is not None:
            kwargs["quantization_config"] = _config(kwargs.get("quantization_config"), size)
            name = _folder(name, size, kwargs)
        return stock(cls, name, *args, **kwargs)

    made = classmethod(from_pretrained)
    setattr(made, _KNOWS, True)
    return made


def _config(given: Any, size: str | int) -> Any:
    from ..base.resources import parse_size
    from ..loading.config import EvoPressConfig

    parse_size(size)
    if given is None:
        return EvoPressConfig(size=size)
    if not isinstance(given, EvoPressConfig) or given.size not in (None, size):
        raise ValueError(
            f"size={size!r} is of models of many sizes (hf-evopress stack), and goes with an "
            f"EvoPressConfig of no other size, got quantization_config={given!r:.200}"
        )
    config = copy.copy(given)
    config.size = size
    return config


def _folder(name: Any, size: str | int, kwargs: dict[str, Any]) -> Any:
    """Return where to load from: of a model on the Hub, a folder with what that size takes."""
    from huggingface_hub import is_offline_mode

    if os.path.isdir(name) or is_offline_mode() or any(map(kwargs.get, _OF_TRANSFORMERS)):
        return name
    from .stack import download

    return download(str(name), size=size, revision=kwargs.pop("revision", None))
