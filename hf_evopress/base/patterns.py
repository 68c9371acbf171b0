"""Patterns of names in rules: globs, or regular expressions after `re:`."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Return whether the whole of `name` matches a glob, or a regular expression after `re:`.

    >>> matches("model.layers.3.mlp.up_proj", "re:.*[.](3|4)[.]mlp[.].*")
    True
    """
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
