"""Refuse models of other classes where only causal language models will do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .classes import CAUSAL, find_class
from .source import check_class


def check_causal(config: Any, name: str | Path, what: str, *, instead: str = "") -> None:
    """Raise ValueError unless a checkpoint is of a causal language model.

    Other classes may be compressed, and `what` ("gguf holds") is of causal ones only: the error
    says so, and then `instead`. Of a class that nothing takes it says what is supported.
    """
    known = [(a, find_class(a)) for a in getattr(config, "architectures", None) or ()]
    others = [(said, kind) for said, kind in known if kind is not None]
    of_own_code = CAUSAL.auto in (getattr(config, "auto_map", None) or {})
    if others and not of_own_code and all(kind is not CAUSAL for _, kind in others):
        more = f"; {instead}" if instead else ""
        raise ValueError(f"{what} causal language models; {name} is a {others[0][0]}{more}")
    check_class(config, name)
