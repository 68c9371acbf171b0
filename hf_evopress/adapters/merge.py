"""Merge an adapter into a compressed model: requantize W_hat + B A at the plan's own levels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.progress import Progress
from ..loading.layers import (
    CompressedLinear,
    compress_linear,
    prepare_layers,
    resolve_units,
)
from ..loading.stitch import block_stats, calibrate_levels
from ..methods import compose
from ..methods.maths.linalg import Stats, map_shared
from ..models.units import Unit, find_units
from ..plans.plan import Plan
from .folder import Adapter, check_fits
from .peft_layers import is_zero


@torch.no_grad()
def merge_adapter(
    model: Any,
    adapter: Adapter,
    tokens: Tensor | None = None,
    *,
    stats: str | Path | None = None,
    progress: Progress | None = None,
) -> Any:
    """Return `model` with `adapter` in its packed weights; its plan and its size stay.

    The model is changed. Layers that the adapter does not touch are left as they are; dense ones
    get the adapter added. tokens (n_sequences, seq_len) calibrate levels that need it, on the
    model with its adapter and as `compress_model` does; or stats is the folder of an earlier
    calibration. What rounding costs is for the caller to measure: at the same bits, some of the
    adapter is lost.
    """
    plan = model.hf_quantizer.quantization_config.plan
    _check_mergeable(model, adapter, plan)
    units = {unit.name: unit for unit in find_units(model)}
    packed: dict[str, CompressedLinear] = {}
    for name in adapter.factors:
        layer = model.get_submodule(name)
        if isinstance(layer, CompressedLinear):
            packed[name] = layer
            model.set_submodule(name, _merged(layer, adapter.delta(name)))
        else:
            layer.weight += adapter.delta(name).to(layer.weight.device, layer.weight.dtype)
    todo = [units[name] for name in units if name in packed]
    levels = {unit.name: packed[unit.name].level for unit in todo}
    calibrated = [unit for unit in todo if compose.needs_stats(levels[unit.name])]
    if calibrated and tokens is None and stats is None:
        raise ValueError(
            f"level '{levels[calibrated[0].name]}' needs calibration data to be made again: "
            "give text (--data), or the folder of an earlier calibration (--work)"
        )
    with tempfile.TemporaryDirectory(prefix="evopress-") as temporary:
        folder = Path(stats if stats is not None else temporary)
        if calibrated and stats is None:
            assert tokens is not None  # checked above
            calibrate_levels(model, tokens, folder, calibrated, levels, progress=progress)
        for block in sorted({unit.block for unit in todo}):
            of_block = [unit for unit in todo if unit.block == block]
            known = block_stats(folder, of_block, levels)
            for unit in of_block:
                W = packed[unit.name].weight.float()
                if any(of.gram.device != W.device for of in known.values()):
                    known = map_shared(known, lambda t, to=W.device: t.to(to))  # type: ignore[misc]
                _replace(model, unit, packed[unit.name], W + adapter.delta(unit.name).to(W), known)
            if progress:
                progress("merge", block + 1, todo[-1].block + 1)
    prepare_layers(model, model.hf_quantizer.quantization_config.runtime)
    _forget_results(model, plan)
    return model


def _replace(
    model: Any, unit: Unit, old: CompressedLinear, W: Tensor, stats: Mapping[str, Stats]
) -> None:
    state = compose.compress(old.level, W.detach().as_subclass(Tensor), stats.get(unit.name))
    device = next(iter(old.state.values())).device
    state = {name: tensor.to(device) for name, tensor in state.items()}
    model.set_submodule(unit.name, compress_linear(old, old.level, state))


def _merged(layer: CompressedLinear, delta: Tensor) -> nn.Linear:
    dense = layer.dequantize()
    dense.weight += delta.to(dense.weight.device, dense.weight.dtype)
    return dense.requires_grad_(False)


def _check_mergeable(model: Any, adapter: Adapter, plan: Plan) -> None:
    dropped = [unit for unit, level in plan.items() if level.is_drop]
    for name in adapter.factors:
        inside = [unit for unit in dropped if f"{name}.".startswith(f"{unit}.")]
        if inside:
            raise ValueError(
                f"the adapter changes {name}, and the plan drops {inside[0]}: there is nothing "
                "to merge into; compute the adapter for this model (hf-evopress adapt)"
            )
    check_fits(model, adapter)
    zero = [name for name in adapter.factors if is_zero(model.get_submodule(name))]
    if zero:
        raise ValueError(
            f"{zero[0]} stores nothing, so packed levels cannot take the adapter; "
            "make its factors part of the checkpoint instead (hf-evopress merge --exact)"
        )
    resolve_units(model, plan)


def _forget_results(model: Any, plan: Plan) -> None:
    """Figures of the plan were those of other weights."""
    model.hf_quantizer.quantization_config.plan = plan.replace(results={})
