"""CRC-32 of the tensors in safetensors files, to tell a damaged checkpoint from a good one.

safetensors notices a file that is too short, not a flipped bit. Files are read in pieces (about
2 GB/s), never mapped, so that checking a checkpoint does not add to the memory it takes.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.reading import reading

_PIECE_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def checksum(data: bytes | memoryview, shape: Sequence[int]) -> str:
    """Return 8 hex digits: the CRC-32 over the shape and the bytes of a tensor."""
    return f"{zlib.crc32(data, _start(shape)):08x}"


def file_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape for every tensor with elements in a safetensors file."""
    with open(path, "rb") as file:
        header, _ = _read_header(file, path)
    return {
        name: tuple(entry["shape"])
        for name, entry in header.items()
        if entry["data_offsets"][0] < entry["data_offsets"][1]
    }


def file_checksums(
    path: str | Path, *, left_out: Collection[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield (tensor name, checksum) for every tensor with elements in a safetensors file.

    Those that are `left_out` are not read.
    """
    with open(path, "rb") as file:
        header, start = _read_header(file, path)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            first, end = entry["data_offsets"]
            if first == end or name in left_out:
                continue
            file.seek(start + first)
            crc, left = _start(entry["shape"]), end - first
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise ValueError(f"{path} is truncated: it ends inside {name}")
                crc = zlib.crc32(piece, crc)
                left -= len(piece)
            yield name, f"{crc:08x}"


def verify_files(
    paths: Iterable[str | Path], expected: Mapping[str, str], *, left_out: Collection[str] = ()
) -> None:
    """Raise ValueError that names the damaged or missing tensors of a checkpoint.

    Tensors that `expected` does not know are left alone, and those that are `left_out`. A tensor
    that no file has counts as missing only if every name in the files is known: some models are
    written under other names than their modules have, and what is missing then shows after loading.
    """
    left_out = set(left_out)
    damaged, found, n_unknown = [], set(left_out), 0
    for path in paths:
        for name, value in file_checksums(path, left_out=left_out):
            if name not in expected:
                n_unknown += 1
                continue
            found.add(name)
            if expected[name] != value:
                damaged.append(f"{name} in {path}")
    if damaged:
        raise ValueError(
            f"the checkpoint is damaged, {len(damaged)} tensors differ from their checksum; "
            f"download or export it again: {_some(damaged)}"
        )
    missing = sorted(set(expected) - found)
    if missing and not n_unknown:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors; "
            f"download or export it again: {_some(missing)}"
        )


def _read_header(file: Any, path: str | Path) -> tuple[dict[str, Any], int]:
    """Return the tensors' entries and the offset at which their bytes start."""
    size, length = os.fstat(file.fileno()).st_size, file.read(8)
    n_bytes = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
    return parse_header(file.read, n_bytes, size, path), 8 + n_bytes


def parse_header(
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
    shape, offsets = entry["shape"], entry["data_offsets"]
    whole = all(isinstance(x, list) and all(type(n) is int for n in x) for x in (shape, offsets))
    if not whole or len(offsets) != 2 or min(shape, default=0) < 0:
        raise TypeError(f"{name} has no shape or no place: {shape!r:.100}, {offsets!r:.100}")
    if not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"the bytes of {name} run backwards: {offsets}")


def _start(shape: Sequence[int]) -> int:
    return zlib.crc32(",".join(map(str, shape)).encode())


def _some(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
