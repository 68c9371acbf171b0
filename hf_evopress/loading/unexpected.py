"""Keys of a checkpoint that transformers shall not report as unexpected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def ignore_keys(model: Any, keys: list[str]) -> None:
    """Keep tensors that are there for others out of the report of unexpected keys.

    Sentinels, and all that is inside a dropped sub-block: a key that ends with a dot stands for
    all that begin with it.
    """
    prefix = f"{model.base_model_prefix}."
    known = model._keys_to_ignore_on_load_unexpected or set()
    patterns = patterns_of(key.removeprefix(prefix) for key in keys)
    model._keys_to_ignore_on_load_unexpected = set(known) | patterns


def patterns_of(keys: Iterable[str]) -> set[str]:
    """Return regular expressions of keys after any prefix, those that differ in a number in one."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", key)
        before, number, after = match.groups() if match else (key, "", "")
        numbers.setdefault((before, after), []).append(number)
    return {
        rf"^(.*\.)?{re.escape(before)}(?:{'|'.join(those)}){re.escape(after)}"
        + ("" if (before + after).endswith(".") else "$")
        for (before, after), those in numbers.items()
    }
