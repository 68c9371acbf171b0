"""Read YAML in which each key of a mapping is there once; YAML itself lets the last one win."""

from __future__ import annotations

from typing import Any

import yaml


class _Once(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in names if names.count(name) > 1 and name != "<<"]:
            line = node.start_mark.line + 1
            raise ValueError(f"{twice[0]!r} is there twice, in the mapping of line {line}")
        return super().construct_mapping(node, deep)


def load_once(text: str) -> Any:
    """Return the values that `text` spells; ValueError names a key that is there twice."""
    loader = _Once(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
