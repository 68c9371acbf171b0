"""Magnitude: the largest weights stay as they are."""

from __future__ import annotations

import torch

from hf_evopress.methods import compose

W = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)).half().float()


def weight(params):
    level = compose.normalize(f"magnitude:{params}")
    return compose.decompress(level, compose.compress(level, W, None), (10, 32), torch.float32)


def test_the_largest_of_the_whole_weight_are_kept_as_they_are():
    least = W.abs().flatten().sort(descending=True).values[79]
    assert torch.equal(weight("sparsity=0.75"), W * (W.abs() >= least))


def test_two_of_four_keeps_the_two_largest_of_each_four():
    groups = W.view(10, 8, 4)
    least = groups.abs().sort(descending=True).values[..., 1:2]
    assert torch.equal(weight("pattern=2:4"), (groups * (groups.abs() >= least)).view(10, 32))
