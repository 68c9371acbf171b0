"""KappaTune: choose the layers with the smallest condition numbers as targets of fine-tuning.

A layer whose singular values are alike holds little that is specialised, so changing it costs
little of what the model knows. PEFT's `find_kappa_target_modules` decides; it is shown the
condition numbers of the weights that packed layers compute, and for low-rank layers those of the
factors' own matrix: a weight of rank r has sigma_1 / sigma_r, not 10^8. Layers that store nothing
are left out. The numbers are kept in a file beside the plan: one singular value decomposition per
layer is minutes on a large model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.fingerprint import model_fingerprint
from ..base.reading import read_object, reading
from ..base.resources import atomic_write
from ..loading.layers import CompressedLinear
from ..methods.lowrank import factors_of
from ..methods.maths.decompositions import qr, singular_values
from ..models.units import find_units
from .folder import base_fingerprint
from .foreign import dense_weight
from .peft_layers import is_zero, takes_adapter

FILE = "kappa.json"


def kappa_targets(
    model: nn.Module,
    share: float = 0.2,
    *,
    everywhere: bool = False,
    cache: str | Path | None = None,
) -> list[str]:
    """Return the `share` of the linear layers with the smallest condition numbers, as names.

    Layers inside decoder blocks; `everywhere` takes in the head, as PEFT does. cache: a file that
    keeps the numbers for the next call, made anew when the weights are others.
    """
    if not 0 < share <= 1:
        raise ValueError(f"kappa takes a share of the layers in (0, 1], got {share}")
    from peft import find_kappa_target_modules

    numbers = condition_numbers(model, everywhere=everywhere, cache=cache)
    numbers = {name: kappa for name, kappa in numbers.items() if takes_adapter(model, name)}
    found = find_kappa_target_modules(_Shown(numbers), top_p=share, show_progress=False)
    return list(found["target_modules"])


def condition_numbers(
    model: nn.Module, *, everywhere: bool = False, cache: str | Path | None = None
) -> dict[str, float]:
    """Return the condition number of every linear layer that stores something, in module order."""
    made_from = [base_fingerprint(model) or model_fingerprint(model), everywhere]
    known = _kept(Path(cache), made_from) if cache is not None else None
    if known is not None:
        return known
    names = None if everywhere else {unit.name for unit in find_units(model)}
    numbers = {
        name: _kappa(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_zero(module) and (not names or name in names)
    }
    if cache is not None:
        atomic_write(cache, json.dumps({"made_from": made_from, "kappa": numbers}, indent=1) + "\n")
    return numbers


def _kept(cache: Path, made_from: list[object]) -> dict[str, float] | None:
    """Return the numbers in a file, None if there are none for these weights."""
    if not cache.is_file():
        return None
    try:
        with reading(cache):
            known = read_object(cache)
            if known["made_from"] != made_from:
                return None
            return {name: float(number) for name, number in known["kappa"].items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{cache} is damaged; remove it to have it made anew ({error})") from error


@torch.no_grad()
def _kappa(layer: nn.Linear) -> float:
    if isinstance(layer, CompressedLinear) and _is_thin(layer):
        W = _core(layer)
    else:
        W = dense_weight(layer, (layer.out_features, layer.in_features), torch.float32)
    values = singular_values(W)
    return float(values[0] / (values[-1] + 1e-8))  # as PEFT has it


def _is_thin(layer: CompressedLinear) -> bool:
    return [term.method for term in layer.level.terms] == ["lowrank"]


def _core(layer: CompressedLinear) -> Tensor:
    """Return the small square matrix that has a low-rank layer's nonzero singular values."""
    A, B = factors_of(layer.level.terms[0], layer.state, layer.shape)
    # B A = Q_B (R_B R_A^T) Q_A^T
    return qr(B.float())[1] @ qr(A.float().T)[1].T


class _Shown:
    """What PEFT looks at of a model: its linear layers, each as small as its number allows."""

    def __init__(self, numbers: Mapping[str, float]) -> None:
        self.numbers = numbers

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for name, number in self.numbers.items():
            layer = nn.Linear(2, 2, bias=False)
            layer.weight.data = torch.tensor([[number, 0.0], [0.0, 1.0]])
            yield name, layer

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())  # fused experts, which are no compressed layers
