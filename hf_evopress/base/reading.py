"""Read files that others wrote: what is wrong with one is said in a sentence that names it.

Whatever a parser raises on a damaged or hostile file (a lookup that fails, a value of another
type, a header that promises too much) becomes a ValueError or TypeError with the file's name in
front; the original error is its cause.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANEW = "delete it to have it made anew"
MAX_JSON_BYTES = 64 * 2**20  # a plan of 100 000 units is 15 MB

_PYTHON = re.compile(  # what Python says of a value that nobody looked at
    r"unhashable|object (has no|is not|does not|cannot)|subscriptable|unsupported operand|"
    r"not supported between|unexpected keyword|positional argument|not iterable|must be str"
)
_OF_PARSERS = {
    "JSONDecodeError": "it is not valid JSON",
    "UnicodeDecodeError": "it is not text in UTF-8",
    "SafetensorError": "it is damaged or no safetensors file",
    "KeyError": "it lacks",
    "IndexError": "it lacks an entry",
    "AttributeError": "a value is of the wrong type",
    "OverflowError": "a number is too large",
    "RecursionError": "it is nested too deep",
    "MemoryError": "it asks for more memory than there is",
}


@contextmanager
def reading(path: str | os.PathLike[str], *, way_out: str = "") -> Iterator[None]:
    """Make what is raised inside a ValueError (or TypeError) that begins with `path`.

    way_out: what to do about it, a phrase such as "delete it to measure anew". Errors that name
    the file already, and those of the operating system, stay as they are.

    >>> with reading("plan.json"):
    ...     json.loads("{")
    Traceback (most recent call last):
    ValueError: plan.json: it is not valid JSON: Expecting property name ...
    """
    try:
        yield
    except Exception as error:
        said = str(error)
        is_named = isinstance(error, (ValueError, TypeError)) and str(path) in said
        is_of_others = isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError"
        if not is_named and not is_of_others:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            tail = f"; {way_out}" if way_out else ""
            raise kind(f"{path}: {_reason(error, said)}{tail}") from error
        raise


def read_json(path: str | os.PathLike[str], *, way_out: str = "") -> Any:
    """Return what a JSON file holds; ValueError names the file, and says where it is wrong."""
    path = Path(path)
    with reading(path, way_out=way_out):
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {size} bytes; at most {MAX_JSON_BYTES} are read")
        return json.loads(path.read_text(encoding="utf-8"))


def read_object(path: str | os.PathLike[str], *, way_out: str = "") -> dict[str, Any]:
    """Return the JSON object that a file holds; another JSON value raises ValueError."""
    found = read_json(path, way_out=way_out)
    with reading(path, way_out=way_out):
        if not isinstance(found, dict):
            raise ValueError(f"it is not a JSON object but {type(found).__name__}")
    return found


def _reason(error: Exception, said: str) -> str:
    kind, said = type(error).__name__, said.removeprefix("Error while deserializing header: ")
    if type(error).__module__.startswith("yaml."):
        return f"it is not valid YAML: {said}"
    if kind not in _OF_PARSERS:
        return f"a value is of the wrong type ({said})" if _PYTHON.search(said) else said or kind
    return f"{_OF_PARSERS[kind]}: {said}" if kind != "KeyError" else f"{_OF_PARSERS[kind]} {said}"
