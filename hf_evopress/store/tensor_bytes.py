"""Tensors of safetensors files as bytes: some of them, in an order that is chosen, to one new file.

Nothing is decoded and nothing else is read, so a source may as well be a server that gives ranges
of bytes. Tensors that follow each other in the source are read in one go.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.resources import atomic_path
from .checksums import parse_header

Read = Callable[[str, int, int], bytes]  # (file, first byte, end) -> bytes

_PIECE_BYTES = 1 << 24
_ALIGNED = 8  # bytes; a tensor of another length would put those behind it out of step


@dataclass(frozen=True)
class Entry:
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
    header = parse_header(lambda n: read(file, 8, 8 + n), n_bytes, size, file)
    base = 8 + n_bytes
    made = [
        Entry(
            name,
            file,
            str(entry["dtype"]),
            tuple(entry["shape"]),
            base + entry["data_offsets"][0],
            base + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    ]
    if late := [entry.name for entry in made if entry.end > size]:
        raise ValueError(f"{file} is truncated: it ends before {late[0]}")
    return sorted(made, key=lambda entry: (entry.start, entry.name))


def in_step(wanted: Sequence[Entry]) -> list[Entry]:
    """Return the tensors with those of odd lengths last, so that all numbers lie where they may."""
    widths = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2}
    even = [entry for entry in wanted if entry.n_bytes % _ALIGNED == 0]
    odd = [entry for entry in wanted if entry.n_bytes % _ALIGNED]
    return even + sorted(odd, key=lambda entry: -widths.get(entry.dtype, 1))


def write_tensors(path: Path, wanted: Sequence[Entry], read: Read = read_local) -> None:
    """Write a safetensors file of these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in wanted:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.n_bytes],
        }
        place += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for source, start, end in _runs(wanted):
            for first in range(start, end, _PIECE_BYTES):
                last = min(first + _PIECE_BYTES, end)
                piece = read(source, first, last)
                if len(piece) != last - first:
                    raise ValueError(
                        f"{source} is truncated: it ends inside bytes {first} to {last}"
                    )
                file.write(piece)


def _runs(wanted: Sequence[Entry]) -> Iterator[tuple[str, int, int]]:
    """Yield (file, start, end) of tensors that follow each other, as one."""
    run: tuple[str, int, int] | None = None
    for entry in wanted:
        if not entry.n_bytes:
            continue
        if run is not None and run[0] == entry.file and run[2] == entry.start:
            run = (run[0], run[1], entry.end)
            continue
        if run is not None:
            yield run
        run = (entry.file, entry.start, entry.end)
    if run is not None:
        yield run
