"""Groups of rows that absorb the errors of earlier ones: by the definition, and for the better."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods import compose
from hf_evopress.methods.maths import row_groups
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.maths.row_groups import GROUPS, round_rows
from hf_evopress.methods.maths.two_sided import TILE, block_factor


def moment(n, seed):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * n, n, generator=g) @ (
        torch.randn(n, n, generator=g) / n**0.5 + 0.3 * torch.eye(n)
    )
    return X.T @ X / (3 * n)


def weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def coarse(rows):
    return ((rows * 2).round(),)


def halves(made):
    return made[0] / 2


def one_by_one(W, G, damp, size):
    """Return W rounded to halves a group at a time, by the definition, in float64."""
    N = block_factor(G, damp, upper=True, block=size).double()
    Y = torch.zeros_like(W, dtype=torch.float64)
    for low in range(0, len(W), size):
        own = slice(low, min(low + size, len(W)))
        lost = W[:low].double() - Y[:low]
        Y[own] = ((W[own] + N.T[own, :low] @ lost) * 2).round() / 2
    return Y.float()


@pytest.mark.parametrize("rows", [5, 16, 40, 300])
def test_rows_are_rounded_by_the_definition(rows):
    W, G = weight(rows, 24), moment(rows, 1)
    size = max(TILE, -(-rows // (GROUPS * TILE)) * TILE)
    ((codes,),) = round_rows([W], [G], 0.3, coarse, halves)
    assert torch.equal(codes[0] / 2, one_by_one(W, G, 0.3, size))


def test_weights_of_different_heights_and_levels_go_together_as_alone():
    Ws, Gs = [weight(n, 24, n) for n in (5, 70, 40)], [moment(5, 1), moment(70, 2), None]

    def scaled(rows):  # the second level is twice as fine
        return ((rows * torch.tensor([2.0, 4.0]).view(2, 1, 1)).round(),)

    def back(made):
        return made[0] / torch.tensor([2.0, 4.0]).view(2, 1, 1)

    together = round_rows(Ws, Gs, 0.3, scaled, back, levels=2)
    for W, G, (codes,) in zip(Ws, Gs, together, strict=True):
        ((alone,),) = round_rows([W], [G], 0.3, scaled, back, levels=2)
        assert codes.shape == (2, *W.shape)
        assert torch.equal(codes, alone)


def test_without_moments_all_rows_go_at_once():
    Ws, seen = [weight(40, 24), weight(8, 24)], []

    def rounder(rows):
        seen.append(rows.shape)
        return coarse(rows)

    made = round_rows(Ws, None, 0.3, rounder, halves)
    assert seen == [(1, 48, 24)]
    assert all(torch.equal(x[0][0], coarse(W)[0]) for W, x in zip(Ws, made, strict=True))


def test_levels_of_one_side_are_no_copies_of_the_weights():
    W, seen = weight(40, 24), []

    def rounder(rows):
        seen.append((rows.shape, rows.stride(0)))
        return coarse(rows)

    round_rows([W], [None], 0.3, rounder, halves, levels=5)
    assert seen == [((5, 40, 24), 0)]


def test_levels_that_lose_too_much_at_once_go_one_after_the_other(monkeypatch):
    W, stats = weight(96, 64), Stats(moment(64, 3), outputs=(moment(96, 4),))
    levels = [compose.normalize(f"gptq:bits={bits},group_size=16") for bits in (2, 3, 4)]
    together = compose.compress_many(levels, [W], stats)
    monkeypatch.setattr(row_groups, "MAX_LOST", W.numel())
    for a, b in zip(together, compose.compress_many(levels, [W], stats), strict=True):
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def test_moments_of_another_size_are_refused():
    with pytest.raises(ValueError, match="40 outputs, the moments of its gradients have 39"):
        round_rows([weight(40, 24)], [moment(39, 1)], 0.3, coarse, halves)


@pytest.mark.parametrize("level", ["gptq:bits=3,group_size=16", "gguf:type=q4_0"])
def test_levels_lose_less_with_both_sides(level):
    """tr(G dW H dW^T), what the loss feels, against one side; nothing changes without G."""
    if level.startswith("gguf"):
        pytest.importorskip("xllamacpp")
    W, H, G = weight(96, 64), moment(64, 3), moment(96, 4)
    one, both = Stats(H), Stats(H, outputs=(G,))

    def loss(text, stats):
        state = compose.compress(compose.normalize(text), W, stats)
        d = W - compose.decompress(compose.normalize(text), state, tuple(W.shape), torch.float32)
        return float(((G @ d) * (d @ H)).sum())

    off = loss(f"{level},outputs=false", both)
    assert loss(level, one) == off
    assert loss(level, both) < 0.9 * off
