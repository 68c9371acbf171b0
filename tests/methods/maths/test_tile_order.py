"""Orders along a walk: both are permutations, and `mma` is that of a warp's registers."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.tile_order import ORDERS, along_walk, in_rows, places


@pytest.mark.parametrize("order", ORDERS)
def test_one_undoes_the_other(order):
    tiles = torch.randn(3, 256)
    assert torch.equal(in_rows(along_walk(tiles, order), order), tiles)
    assert torch.equal(along_walk(in_rows(tiles, order), order), tiles)


def test_mma_is_what_the_lanes_of_a_warp_hold():
    """PTX: lane l holds of B (16 x 8) rows 2 (l % 4) + {0, 1, 8, 9} of column l / 4, twice."""
    wanted = []
    for lane in range(32):
        for column in (lane // 4, lane // 4 + 8):
            wanted += [16 * column + 2 * (lane % 4) + row for row in (0, 1, 8, 9)]
    assert places().tolist() == wanted
