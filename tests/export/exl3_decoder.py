"""What EXL3's tensors mean, decoded step by step: an oracle that shares no code with the package.

After exllamav3 1.4.1: reconstruct.cu, exl3_dq.cuh, codebook.cuh and exl3.py. Slow; in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

N = 128  # of a Hadamard matrix
HADAMARD = np.array([[(-1) ** bin(i & j).count("1") for j in range(N)] for i in range(N)]) / N**0.5


def weight(tensors: Mapping[str, Any]) -> Any:
    """Return W (out, in) float64 of trellis, suh, svh and the codebook's mark, without rounding."""
    core = coded(tensors["trellis"], book_of(tensors)).astype(np.float64)
    turned = _by_blocks(_by_blocks(core.T).T)
    suh, svh = (tensors[n].astype(np.float64) for n in ("suh", "svh"))
    return (suh[:, None] * turned * svh[None, :]).T


def product(x: Any, tensors: Mapping[str, Any]) -> Any:
    """Return x W^T, x (tokens, in), rounded to half precision where exllamav3 does for prompts."""
    x = (x.astype(np.float16) * tensors["suh"]).astype(np.float32)
    x = _by_blocks(x).astype(np.float16).astype(np.float32)
    y = (x @ coded(tensors["trellis"], book_of(tensors)).astype(np.float32)).astype(np.float16)
    return _by_blocks(y.astype(np.float32)).astype(np.float16) * tensors["svh"]


def book_of(tensors: Mapping[str, Any]) -> str:
    return next((name for name in ("mcg", "mul1") if name in tensors), "3inst")


def coded(trellis: Any, book: str) -> Any:
    """Return the values (in, out) float16 of tiles (in / 16, out / 16, 16 * bits) int16."""
    rows, columns, width = trellis.shape
    made = np.zeros((16 * rows, 16 * columns), np.float16)
    for r in range(rows):
        for c in range(columns):
            states = _states(trellis[r, c].view(np.uint16), width // 16)
            for place, value in enumerate(_values(states, book)):
                lane, of_lane = divmod(place, 8)
                row = 2 * (lane % 4) + of_lane % 2 + 8 * (of_lane // 2 % 2)
                column = lane // 4 + 8 * (of_lane // 4)
                made[16 * r + row, 16 * c + column] = value
    return made


def _states(halves: Any, bits: int) -> Any:
    """Return the 16-bit states of the 256 weights of a tile."""
    words = [int(halves[i]) | int(halves[i + 1]) << 16 for i in range(0, len(halves), 2)]
    states = []
    for place in range(256):
        end = (place + 257) * bits  # in a circle of 256 * bits, the last bit of the state
        first, last = (end - 16) // 32 % len(words), (end - 1) // 32 % len(words)
        both = words[first] << 32 | words[last]
        states.append(both >> (-end % 32) & 0xFFFF)
    return np.array(states, np.uint32)


def _values(states: Any, book: str) -> Any:
    with np.errstate(over="ignore"):
        if book == "mul1":
            x = states * np.uint32(0x83DCD12D)
            total = sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24)) + 0x6400
            a, b, c = (
                np.asarray(n).astype(np.uint16).view(np.float16).astype(np.float64)
                for n in (total, 0x1EEE, 0xC931)
            )
            return (a * b + c).astype(np.float16)  # a fused multiply-add: rounded once
        x = states * np.uint32(0xCBAC1FED)
        if book == "3inst":
            x = states * np.uint32(89226354) + np.uint32(64248484)
    x = x & np.uint32(0x8FFF8FFF) ^ np.uint32(0x3B603B60)
    halves = [(x >> shift).astype(np.uint16).view(np.float16) for shift in (0, 16)]
    return halves[0] + halves[1]


def _by_blocks(x: Any) -> Any:
    """Return x (n, m) times Hadamard matrices along its rows, 128 numbers at a time."""
    return (x.reshape(len(x), -1, N) @ HADAMARD.astype(x.dtype)).reshape(x.shape)
