"""In which order a walk visits the 256 weights of its tile of 16 x 16.

rows  row after row, each from left to right
mma   as the 32 lanes of a warp hold a tile in tensor cores, eight weights each (operand B of
      mma.m16n8k16, NVIDIA's PTX ISA, twice), and as EXL3 files of exllamav3 have it: the weight
      with the bits p7 ... p0 of its place p in the walk is that of output 8 p2 + (p7 p6 p5) and
      input 8 p1 + 2 (p4 p3) + p0.

The order is part of the code: a state depends on the weights before it in the walk.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...base.lasting import lasting

ORDERS = ("rows", "mma")


def along_walk(tiles: Tensor, order: str) -> Tensor:
    """Return tiles (..., 256), row after row, with their weights in the order of the walk."""
    return tiles if order == "rows" else tiles[..., places(tiles.device)]


def in_rows(walks: Tensor, order: str) -> Tensor:
    """Return walks (..., 256) with their weights row after row: what undoes `along_walk`."""
    return walks if order == "rows" else walks[..., places(walks.device).argsort()]


@lru_cache(maxsize=8)
@lasting
def places(device: torch.device | None = None) -> Tensor:
    """Return 16 * output + input of each weight of a walk in the order `mma`, (256,) int64."""
    p = torch.arange(256, device=device)
    output = 8 * (p >> 2 & 1) + (p >> 5)
    return 16 * output + 8 * (p >> 1 & 1) + 2 * (p >> 3 & 3) + (p & 1)
