"""CRC-32 of the tensors in safetensors files, to tell a damaged checkpoint from a good one.

safetensors notices a file that is too short, not a flipped bit. Files are read in pieces (about
2 GB/s a thread), never mapped, so that checking a checkpoint does not add to the memory it takes.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from .header import Entry

_PIECE_BYTES = 1 << 20  # what is read at a time; the next step then finds it in the cache
_PART_BYTES = 1 << 24  # what a thread is given at a time
_MOST_THREADS = 8  # a disk gives no more to more


def checksum(data: bytes | memoryview, shape: Sequence[int]) -> str:
    """Return 8 hex digits: the CRC-32 over the shape and the bytes of a tensor."""
    return f"{zlib.crc32(data, _start(shape)):08x}"


def checksums_of(tensors: Iterable[Entry]) -> Iterator[tuple[Entry, str]]:
    """Yield (tensor, checksum) for every tensor with elements, read by PyTorch's threads."""
    parts = _parts(entry for entry in tensors if entry.n_bytes)
    pool = ThreadPoolExecutor(min(_MOST_THREADS, torch.get_num_threads()))
    try:
        for part, values in zip(parts, pool.map(_read, parts), strict=True):
            yield from zip(part, values, strict=True)
    finally:
        pool.shutdown(cancel_futures=True)  # also where somebody pressed Ctrl-C


def verify_tensors(
    tensors: Sequence[Entry], expected: Mapping[str, str], *, left_out: Collection[str] = ()
) -> None:
    """Raise ValueError that names the damaged or missing tensors of a checkpoint's files.

    Tensors that `expected` does not know are left alone, and those that are `left_out`. A tensor
    that no file has counts as missing only if every name in the files is known: what was written by
    older versions may have tensors under names that were not, and what is missing then shows after
    loading.
    """
    names = {entry.name for entry in tensors if entry.n_bytes}.union(left_out)
    wanted = set(expected).difference(left_out)
    damaged = [
        f"{entry.name} in {entry.file}"
        for entry, value in checksums_of(entry for entry in tensors if entry.name in wanted)
        if expected[entry.name] != value
    ]
    if damaged:
        raise ValueError(
            f"the checkpoint is damaged, {len(damaged)} tensors differ from their checksum; "
            f"download or export it again: {_some(damaged)}"
        )
    missing = sorted(set(expected) - names)
    if missing and names <= set(expected).union(left_out):
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors; "
            f"download or export it again: {_some(missing)}"
        )


def _parts(tensors: Iterable[Entry]) -> list[list[Entry]]:
    """Return runs of tensors of one file, each of several megabytes."""
    parts: list[list[Entry]] = []
    size = 0
    for entry in tensors:
        if not parts or size >= _PART_BYTES or entry.file != parts[-1][-1].file:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.n_bytes
    return parts


def _read(part: list[Entry]) -> list[str]:
    """Return the checksums of tensors of one file."""
    values, buffer = [], memoryview(bytearray(_PIECE_BYTES))
    with open(part[0].file, "rb", buffering=0) as file:
        for entry in part:
            file.seek(entry.start)
            crc, left = _start(entry.shape), entry.n_bytes
            while left:
                n = file.readinto(buffer[: min(left, _PIECE_BYTES)])
                if not n:
                    raise ValueError(f"{entry.file} is truncated: it ends inside {entry.name}")
                crc = zlib.crc32(buffer[:n], crc)
                left -= n
            values.append(f"{crc:08x}")
    return values


def _start(shape: Sequence[int]) -> int:
    return zlib.crc32(",".join(map(str, shape)).encode())


def _some(items: list[str]) -> str:
    return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
