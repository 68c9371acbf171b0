"""The PQ-index and the share of weights that it says must be kept."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.pq_index import kept_share, pq_index


@pytest.mark.parametrize("p, q", [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)])
def test_it_knows_neither_scale_nor_order(p: float, q: float) -> None:
    w = torch.randn(999, generator=torch.Generator().manual_seed(0)).double()
    index = pq_index(w, p=p, q=q)
    assert pq_index(1e-6 * w, p=p, q=q) == pytest.approx(index, abs=1e-9)
    assert pq_index(w.flip(0) * 1e6, p=p, q=q) == pytest.approx(index, abs=1e-9)


def test_it_is_the_published_formula() -> None:
    w = torch.tensor([3.0, -1.0, 0.25, 0.0])
    by_hand = 1 - 4 ** (1 / 2 - 1) * w.abs().sum() / w.square().sum().sqrt()
    assert pq_index(w, p=1.0, q=2.0) == pytest.approx(float(by_hand))


def test_equal_weights_have_index_0_and_one_of_many_nearly_1() -> None:
    alone = torch.zeros(10_000)
    alone[7] = 2.0
    assert pq_index(torch.full((50,), -3.0)) == 0 == pq_index(torch.zeros(5))
    assert pq_index(alone) == pytest.approx(1 - 1e-4) and kept_share(alone) == pytest.approx(1e-4)


def test_more_may_be_lost_means_fewer_are_kept() -> None:
    w = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    assert kept_share(w, eta=0.5) < kept_share(w) < 1
    with pytest.raises(ValueError, match="0 < p <= 1 and p < q, got p=2, q=1"):
        pq_index(w, p=2, q=1)
    with pytest.raises(ValueError, match="0 or more; got -1"):
        kept_share(w, eta=-1)
