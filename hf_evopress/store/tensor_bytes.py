"""Tensors of safetensors files as bytes: some of them, in an order that is chosen, to one new file.

Nothing is decoded and nothing else is read, so a source may as well be a server that gives ranges
of bytes. Tensors that follow each other in the source are read in one go.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..base.resources import atomic_path
from .header import Entry, Read, read_local

_PIECE_BYTES = 1 << 24
_ALIGNED = 8  # bytes; a tensor of another length would put those behind it out of step


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
