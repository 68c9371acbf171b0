"""Wanda: the score, and who is compared with whom."""

from __future__ import annotations

import torch

from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats

G = torch.Generator().manual_seed(0)
W = torch.randn(10, 32, generator=G)
X = torch.randn(200, 32, generator=G) * torch.linspace(0.1, 4, 32)
STATS = Stats(X.T @ X / 200, None, None, 200)


def kept(params):
    level = compose.normalize(f"wanda:{params}")
    state = compose.compress(level, W, STATS)
    return compose.decompress(level, state, (10, 32), torch.float32) != 0


def test_each_row_keeps_its_largest_scores():
    scores = W.abs() * X.square().mean(0).sqrt()
    least = scores.sort(dim=1, descending=True).values[:, 7:8]
    assert torch.equal(kept("sparsity=0.75"), scores >= least)


def test_rows_differ_by_at_most_one_weight_and_the_total_is_exact():
    counts = kept("sparsity=0.42").sum(1)
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.sum()) == 320 - round(320 * 0.42)


def test_loud_inputs_keep_more_weights_than_magnitude_gives_them():
    level = compose.normalize("magnitude:sparsity=0.5")
    blind = compose.decompress(level, compose.compress(level, W, None), (10, 32), torch.float32)
    assert kept("sparsity=0.5")[:, 24:].sum() > (blind != 0)[:, 24:].sum()
