"""Checks of single values, which name the value and what is near."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..base.plugins import did_you_mean


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is known."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}{did_you_mean(value, list(known))}")


def at_least(settings: Any, least: int, *keys: str) -> None:
    """Raise ValueError unless each of these attributes is `least` or more."""
    for key in keys:
        if getattr(settings, key) < least:
            raise ValueError(f"{key} must be at least {least}, got {getattr(settings, key)}")
