"""Dense levels keep 16 bits, and lose nothing of a 16-bit model."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods import compose
from hf_evopress.plans.level import DENSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_comes_back_exactly(dtype):
    W = torch.randn(24, 64).to(dtype).float()
    state = compose.compress(DENSE, W, None)
    assert torch.equal(compose.decompress(DENSE, state, (24, 64), torch.float32), W)


def test_a_float32_weight_is_rounded_to_the_finer_format_that_holds_it():
    W = torch.randn(24, 64)
    assert compose.compress(DENSE, W, None)["weight"].dtype == torch.float16
    state = compose.compress(DENSE, W * 1e6, None)
    assert state["weight"].dtype == torch.bfloat16, "float16 would overflow"


def test_dense_costs_16_bits_per_weight():
    assert compose.cost_bits(DENSE, (24, 64)) == 16 * 24 * 64
