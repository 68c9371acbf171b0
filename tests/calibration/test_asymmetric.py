"""The shifted weight is the least-squares answer to the dense outputs from compressed inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.calibration.asymmetric import CrossMoment, Shift, shifted_weight
from hf_evopress.methods.maths.linalg import Stats


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """W (6, 8), x and x' (4, 50, 8)."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 8, generator=g)
    return torch.randn(6, 8, generator=g), x, x + 0.3 * torch.randn(4, 50, 8, generator=g)


def moments(x: Tensor, own: Tensor, *, with_sink: bool = False) -> tuple[Stats, Shift]:
    gram, sink = CrossMoment(own), CrossMoment(own)
    for dense, compressed in zip(x, own, strict=True):
        gram.add(dense, compressed)
        sink.add(dense[:1], compressed[:1])
    stats = Stats(gram.own.gram(), sink.own.gram() if with_sink else None)
    return stats, Shift(gram.shift(), sink.shift() if with_sink else None)


def test_the_whole_correction_is_least_squares(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    W, x, own = inputs
    made = shifted_weight(W, *moments(x, own), damp=1e-6, alpha=1.0)
    exact = torch.linalg.lstsq(own.flatten(0, 1), x.flatten(0, 1) @ W.T).solution.T
    torch.testing.assert_close(made, exact, atol=1e-4, rtol=1e-4)


def test_equal_inputs_leave_the_weight_as_it_is(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    W, x, _ = inputs
    torch.testing.assert_close(shifted_weight(W, *moments(x, x, with_sink=True)), W)


def test_alpha_is_the_share_of_the_correction(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    W, x, own = inputs
    stats, shift = moments(x, own, with_sink=True)
    whole, half = (shifted_weight(W, stats, shift, alpha=a) for a in (1.0, 0.5))
    torch.testing.assert_close(half, (W + whole) / 2)
    assert torch.equal(shifted_weight(W, stats, shift, alpha=0.0), W)


def test_the_sink_pulls_the_weight_towards_position_0(
    inputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    W, x, own = inputs
    stats, shift = moments(x, own, with_sink=True)

    def error(weight: Tensor) -> float:
        return float((own[:, 0] @ weight.T - x[:, 0] @ W.T).square().sum())

    none, some = (shifted_weight(W, stats, shift, damp=1e-4, sink=s) for s in (0.0, 5.0))
    assert error(some) < error(none)
