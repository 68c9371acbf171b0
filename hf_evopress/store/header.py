"""What a safetensors file says of its tensors: names, dtypes, shapes and places.

Nothing is decoded and nothing else is read, so a file may as well be on a server that gives ranges
of bytes. Written here, not taken from the safetensors library, as that gives no places.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..base.reading import reading

Read = Callable[[str, int, int], bytes]  # (file, first byte, end) -> bytes

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class Entry(NamedTuple):
    """One tensor of a file: its place in it, from `start` to `end`."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.end - self.start


def read_local(file: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` to before `end`."""
    with open(file, "rb") as opened:
        opened.seek(start)
        return opened.read(end - start)


def entries(file: str, size: int, read: Read = read_local) -> list[Entry]:
    """Return the tensors of a safetensors file of `size` bytes, in the order of their bytes."""
    length = read(file, 0, 8)
    n_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
    header = _parse(lambda n: read(file, 8, 8 + n), n_bytes, size, file)
    base = 8 + n_bytes
    made = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        place = base + start, base + end
        made.append(Entry(name, file, entry["dtype"], tuple(entry["shape"]), *place))
    if late := [entry.name for entry in made if entry.end > size]:
        raise ValueError(f"{file} is truncated: it ends before {late[0]}")
    if made and (end := max(entry.end for entry in made)) < size:
        raise ValueError(f"{file} is damaged: {size - end} bytes follow its last tensor")
    return sorted(made, key=lambda entry: (entry.start, entry.name))


def entries_of(file: str | Path) -> list[Entry]:
    """Return the tensors of a safetensors file, in the order of their bytes."""
    return entries(str(file), os.path.getsize(file))


def _parse(
    read: Callable[[int], bytes], n_bytes: int, size: int, path: str | Path
) -> dict[str, Any]:
    """Return the entries that `read(n_bytes)` has, of a safetensors file of `size` bytes."""
    try:
        with reading(path):
            if not 2 <= n_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"it claims {n_bytes} bytes, and the file has {size}")
            header = json.loads(read(n_bytes))
            if not isinstance(header, dict):
                raise TypeError(f"it is not an object but {type(header).__name__}")
            header.pop("__metadata__", None)
            for name, entry in header.items():
                _check_entry(name, entry)
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path} is damaged or no safetensors file: its header cannot be read ({reason}); "
            "export or download it again"
        ) from error
    return header


def _check_entry(name: str, entry: Any) -> None:
    dtype, shape, offsets = (entry[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise TypeError(f"{name} has no dtype: {dtype!r:.100}")
    whole = all(isinstance(x, list) and all(type(n) is int for n in x) for x in (shape, offsets))
    if not whole or len(offsets) != 2 or min(shape, default=0) < 0:
        raise TypeError(f"{name} has no shape or no place: {shape!r:.100}, {offsets!r:.100}")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"the bytes of {name} run backwards: {offsets}")
