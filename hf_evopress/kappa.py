"""KappaTune: train the layers with the smallest condition number, forget the least.

A layer whose singular values are alike holds little that is specialised, so changing it costs
little of what the model knows. PEFT's `find_kappa_target_modules` decides; it is shown the
weights that packed layers compute, and for low-rank layers the factors' own matrix: a weight of
rank r has a condition number sigma_1 / sigma_r, not 10^8. Layers that store nothing are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .layers import CompressedLinear
from .methods.lowrank import factors_of
from .peft_layers import is_zero
from .units import find_units


def kappa_targets(model: nn.Module, share: float = 0.2, *, everywhere: bool = False) -> list[str]:
    """Return the `share` of the linear layers with the smallest condition numbers, as names.

    Layers inside decoder blocks; `everywhere` takes in the head, as PEFT does. One singular
    value decomposition per layer.
    """
    if not 0 < share <= 1:
        raise ValueError(f"kappa takes a share of the layers in (0, 1], got {share}")
    from peft import find_kappa_target_modules

    names = None if everywhere else {unit.name for unit in find_units(model)}
    found = find_kappa_target_modules(_Shown(model, names), top_p=share, show_progress=False)
    return list(found["target_modules"])


class _Shown:
    """What PEFT looks at of a model: its linear layers, low-rank ones as their core."""

    def __init__(self, model: nn.Module, names: set[str] | None) -> None:
        self.model, self.names = model, names

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.model.named_modules():
            if is_zero(module) or (self.names is not None and name not in self.names):
                continue
            is_thin = isinstance(module, CompressedLinear) and _is_thin(module)
            yield name, (_Core(module) if is_thin else module)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())  # fused experts, which are no compressed layers


def _is_thin(layer: CompressedLinear) -> bool:
    return [term.method for term in layer.level.terms] == ["lowrank"]


class _Core(nn.Linear):
    """A low-rank layer as the small square matrix that has its nonzero singular values."""

    def __init__(self, layer: CompressedLinear) -> None:
        nn.Module.__init__(self)
        self.__dict__["layer"] = layer

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        layer: Any = self.__dict__["layer"]
        A, B = factors_of(layer.level.terms[0], layer.state, layer.shape)
        # B A = Q_B (R_B R_A^T) Q_A^T
        return torch.linalg.qr(B.float()).R @ torch.linalg.qr(A.float().T).R.T
