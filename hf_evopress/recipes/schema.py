"""The JSON schema of recipes for editors, generated from the dataclasses.

python -c "from hf_evopress.recipes.schema import write_schema; write_schema()"
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.plugins import names
from ..base.resources import atomic_write, bundled
from ..search.ask_tell import STRATEGIES
from .recipe import DTYPES, OFFLOAD, REFINE, SEARCH_DTYPES, Recipe, Search
from .targets import EXPORTS

_BASIC = {str: "string", int: "integer", float: "number", bool: "boolean"}


def recipe_schema() -> dict[str, Any]:
    """Return the schema (JSON Schema draft 2020-12) of a recipe."""
    schema = _object(Recipe)
    schema["properties"]["for"] = schema["properties"]["export"]
    ways = [name for name in schema["properties"]["budget"]["properties"] if name != "context"]
    schema["properties"]["budget"] |= {
        "oneOf": [{"required": [name]} for name in ways],
        "dependentRequired": {"context": ["size"]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hf-evopress recipe",
        **schema,
    }


def write_schema(path: str | Path | None = None) -> Path:
    """Write the schema to `path`, by default recipes/schema.json, and return the path."""
    path = Path(path) if path is not None else bundled("recipes") / "schema.json"
    return atomic_write(path, json.dumps(recipe_schema(), indent=2) + "\n")


def _object(cls: type) -> dict[str, Any]:
    hints, notes = typing.get_type_hints(cls), _comments(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        schema = _type(hints[field.name])
        if choices := _choices(cls, field.name):
            schema["enum"] = choices
        if note := notes.get(field.name):
            schema["description"] = note
        has_default = field.default is not dataclasses.MISSING
        if not has_default and field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        elif has_default and isinstance(field.default, (str, int, float)):
            schema["default"] = field.default
        properties[field.name] = schema
    made: dict[str, Any] = {
        "type": "object",
        "description": (inspect.getdoc(cls) or "").partition("\n")[0],
        "properties": properties,
        "additionalProperties": False,
    }
    return {**made, "required": required} if required else made


def _type(kind: Any) -> dict[str, Any]:
    """Return the schema of an annotation, one of those that recipe.py converts."""
    if dataclasses.is_dataclass(kind):
        return _object(typing.cast(type, kind))
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _type(next(a for a in args if a is not type(None)))
    if origin is tuple:
        item = _type(args[0])
        # one item may be written without its brackets
        return {"anyOf": [{"type": "array", "items": item}, item]}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        values = {} if args[1] is Any else {"additionalProperties": _type(args[1])}
        return {"type": "object", **values}
    return {"type": ["string", "number"]} if kind is str else {"type": _BASIC[kind]}


def _choices(cls: type, name: str) -> list[str]:
    known = {
        (Recipe, "dtype"): list(DTYPES),
        (Recipe, "offload"): list(OFFLOAD),
        (Search, "dtype"): list(SEARCH_DTYPES),
        (Recipe, "refine"): list(REFINE),
        (Recipe, "export"): list(EXPORTS),
        (Search, "strategy"): sorted(STRATEGIES),
        (Search, "fitness"): names("fitness"),
    }
    return known.get((cls, name), [])


def _comments(cls: type) -> dict[str, str]:
    """Return the comment behind each field: what people read in recipe.py, editors show."""
    pattern = re.compile(r"^    (\w+): .*?#\s*(.+)$")
    found = (pattern.match(line) for line in inspect.getsource(cls).splitlines())
    return {match[1]: match[2] for match in found if match}
