"""Decompositions fall back to the CPU in float64 where a device's solver gives up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_evopress.methods.maths import decompositions as d

from ... import second_device  # noqa: F401  registers the device

SIM = torch.device("sim", 0)
M = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
SQUARE = M @ M.T + torch.eye(8)

WAYS: dict[str, tuple[str, Callable[[Tensor], Any], Tensor]] = {
    "eigh": ("eigh", d.eigh, SQUARE),
    "svd": ("svd", d.svd, M[:5]),
    "singular values": ("svdvals", d.singular_values, M[:5]),
    "qr": ("qr", d.qr, M),
    "least squares": ("lstsq", lambda A: d.least_squares(A, A @ A), M),
    "cholesky": ("cholesky", d.cholesky, SQUARE),
}


def tensors(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("way", WAYS)
def test_a_solver_that_gives_up_on_a_device_is_the_cpus(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, function, matrix = WAYS[way]
    plain = getattr(torch.linalg, name)
    asked: list[tuple[str, torch.dtype]] = []

    def fragile(A: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append((A.device.type, A.dtype))
        if A.device.type == "sim":
            raise torch.linalg.LinAlgError("the algorithm failed to converge\nand more")
        return plain(A, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, name, fragile)
    with caplog.at_level(logging.WARNING):
        found = tensors(function(matrix.to(SIM)))
    wanted = tensors(function(matrix.double()))
    assert asked[:2] == [("sim", torch.float32), ("cpu", torch.float64)]
    assert all(t.device == SIM and t.dtype == torch.float32 for t in found)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours.cpu().double(), theirs, atol=1e-4)
    assert [r.message for r in caplog.records] == [
        "on the CPU in float64, as it failed on sim:0: the algorithm failed to converge"
    ]


def test_what_is_not_positive_definite_anywhere_has_no_factor() -> None:
    assert d.cholesky_or_none(-SQUARE) is None
    assert d.cholesky_or_none(-SQUARE.double()) is None
    with pytest.raises(torch.linalg.LinAlgError):
        d.cholesky(-SQUARE.double())
    assert torch.equal(d.cholesky(SQUARE), torch.linalg.cholesky(SQUARE))
