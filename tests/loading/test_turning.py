"""Activations are rotated by the compiled kernel as the reference rotates them, to the bit."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.loading.kernels.cpu.turning import rotate_rows
from hf_evopress.methods.maths.rotation import parts, rotate, unrotate

SIZES = (1, 6, 8, 13, 48, 192, 224, 320, 576, 1536, 2048, 4096, 14336)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_scales", [0, 1, "n"])
def test_rotations_are_the_references(n: int, n_scales: int | str) -> None:
    torch.manual_seed(0)
    count = n if n_scales == "n" else int(n_scales)
    scales = torch.rand(count) + 0.5 if count else None
    factor = 1.0 if scales is None else scales
    x, own = torch.randn(5, n), parts(n, 3)
    there = rotate_rows(x, own, torch.float32, scales, is_back=False)
    torch.testing.assert_close(there, rotate((x * factor).T.contiguous(), 3).T, rtol=0, atol=2e-5)
    back = rotate_rows(x, own, torch.float32, scales, is_back=True)
    torch.testing.assert_close(back, unrotate(x.T.contiguous(), 3).T * factor, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        rotate_rows(there, own, torch.float32, None, is_back=True), x * factor, rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("n", [size for size in SIZES if size & (size - 1) == 0])
def test_where_nothing_is_mixed_they_are_the_same_bits(n: int) -> None:
    x = torch.randn(70, n)
    assert torch.equal(
        rotate_rows(x, parts(n, 1), torch.float32, None, is_back=False),
        rotate(x.T.contiguous(), 1).T,
    )


@pytest.mark.parametrize("block", [16, 64])
def test_blocks_are_rotated_each_for_itself(block: int) -> None:
    x = torch.randn(4, 320)
    own = rotate_rows(x, parts(320, 2, block), torch.float32, None, is_back=False)
    assert torch.equal(own, rotate(x.T.contiguous(), 2, block).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_back", [False, True])
def test_short_numbers_are_read_and_rounded_once(dtype: torch.dtype, is_back: bool) -> None:
    x, own = torch.randn(9, 448).to(dtype), parts(448, 5)
    wide = rotate_rows(x.float(), own, torch.float32, None, is_back=is_back)
    assert torch.equal(rotate_rows(x, own, dtype, None, is_back=is_back), wide.to(dtype))


def test_rows_of_a_slice_and_no_rows_at_all() -> None:
    x = torch.randn(6, 128)
    part = x[:, 32:96]
    own = rotate_rows(part, parts(64, 0), torch.float32, None, is_back=False)
    assert torch.equal(own, rotate(part.T.contiguous(), 0).T)
    none = rotate_rows(x[:0], parts(128, 0), torch.bfloat16, None, is_back=True)
    assert none.shape == (0, 128) and none.dtype == torch.bfloat16


def test_threads_share_the_tokens() -> None:
    before, x = torch.get_num_threads(), torch.randn(513, 1536)
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(rotate_rows(x, parts(1536, 0), torch.float32, None, is_back=False))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
