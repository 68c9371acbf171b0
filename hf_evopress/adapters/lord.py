"""Convert low-rank terms of a checkpoint to a LoRA adapter and back, bit for bit.

`lowrank` as the last term of a level is the same pair of factors as a LoRA adapter of scaling 1.
`to_peft` takes them out: what is left is the level without them, or `zero` where they were all
there was (LoRD), so that a layer is a LoRA adapter over nothing and trains as such. `from_peft`
puts an adapter's factors into the checkpoint as the last term: LoRD back again, or an EoRA
adapter and its base become one model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..loading.layers import CompressedLinear, compress_linear, compressed_linears, resolve_units
from ..loading.quantizer import attach
from ..methods import compose
from ..methods.base import State
from ..methods.maths.factors import FLOATS
from ..plans.level import Level, Term
from .folder import Adapter, base_fingerprint, check_fits, check_target, write_adapter

_NAMES = {dtype: name for name, dtype in FLOATS.items()}


def to_peft(model: Any, folder: str | Path, *, base_model: str | None = None) -> Any:
    """Return `model` without its last low-rank terms, written to `folder` as a LoRA adapter.

    The model is changed: its plan says `zero` where a low-rank term was the whole level. Levels
    with int8 or int4 factors, or with centred=true, are more than a LoRA adapter can hold and
    raise ValueError. The adapter notes the levels, for `from_peft` to give them back.
    """
    check_target(folder)
    plan = model.hf_quantizer.quantization_config.plan
    unit_of = {path: unit for unit, path in resolve_units(model, plan).items()}
    layers = {n: m for n, m in compressed_linears(model).items() if _is_low_rank(m.level)}
    if not layers:
        raise ValueError("no level of the model ends in a low-rank term; there is nothing to take")
    for name, layer in layers.items():
        _check_plain(name, layer.level)
    factors, levels = {}, dict(plan.levels)
    for name, layer in layers.items():
        rest, state, pair = _without_last(layer)
        factors[name] = pair
        model.set_submodule(name, compress_linear(layer, rest, state))
        levels[unit_of[name]] = rest
    attach(model, plan.replace(levels={k: str(v) for k, v in levels.items()}, budget={}))
    about = {
        "made_by": "lord",
        "base": base_fingerprint(model),
        "levels": {name: str(layer.level) for name, layer in layers.items()},
    }
    write_adapter(folder, factors, base_model=base_model, about=about)
    return model


def from_peft(model: Any, adapter: Adapter) -> Any:
    """Return `model` with an adapter's factors as the last term of its layers' levels.

    The model is changed, and its plan with it; numbers stay the same to the bit. Raises
    ValueError for an adapter that is not one of plain 16-bit factors at scaling 1, as written by
    `to_peft` and `eora`, or that changes layers which are dense or dropped.
    """
    check_fits(model, adapter)
    plan = model.hf_quantizer.quantization_config.plan
    unit_of = {path: unit for unit, path in resolve_units(model, plan).items()}
    known = adapter.about.get("levels", {})
    made: dict[str, CompressedLinear] = {}
    for name, (A, B) in adapter.factors.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, CompressedLinear):
            raise ValueError(
                f"{name} is dense, and a dense layer takes no low-rank term; merge the adapter "
                "instead (hf-evopress merge without --exact)"
            )
        level, state = _with_last(name, layer, A, B, adapter.scaling.get(name, 1.0))
        if name in known:  # the same tensors, and how they were made
            level = _as_known(level, compose.normalize(known[name]))
        made[name] = compress_linear(layer, level, state)
    levels = {unit: str(level) for unit, level in plan.items()}
    for name, new in made.items():
        model.set_submodule(name, new)
        levels[unit_of[name]] = str(new.level)
    attach(model, plan.replace(levels=levels, budget={}, results={}))
    return model


def _is_low_rank(level: Level) -> bool:
    return level.terms[-1].method == "lowrank"


def _check_plain(name: str, level: Level) -> None:
    params = compose.method("lowrank").filled(level.terms[-1].kwargs)
    if params["centred"] or params["factors"] not in FLOATS:
        raise ValueError(
            f"{name} has level '{level}'; a LoRA adapter holds two 16-bit factors and no bias: "
            "use factors=float16 or bfloat16 and leave centred out"
        )


def _without_last(layer: CompressedLinear) -> tuple[Level, State, tuple[Tensor, Tensor]]:
    """Return the level without its last term, its state, and the last term's A and B."""
    terms, state = layer.level.terms, layer.state
    end = f"_{len(terms) - 1}" if len(terms) > 1 else ""
    pair = (state.pop(f"A{end}").detach(), state.pop(f"B{end}").detach())
    if len(terms) > 1:
        return Level(terms[:-1]), state, pair
    zero = compose.normalize("zero")
    nothing = torch.empty(0, dtype=torch.uint8, device=pair[0].device)
    return zero, {"nothing": nothing}, pair


def _as_known(level: Level, known: Level) -> Level:
    """Return `level` with what `known` says of how its factors were made, at its own rank."""
    mine, theirs = level.terms[-1].kwargs, known.terms[-1].kwargs
    if known.terms[:-1] != level.terms[:-1] or mine.get("factors") != theirs.get("factors"):
        return level
    last = Term.of("lowrank", **{**theirs, "rank": mine["rank"]})
    return compose.normalize(Level((*level.terms[:-1], last)))


def _with_last(
    name: str, layer: CompressedLinear, A: Tensor, B: Tensor, scaling: float
) -> tuple[Level, State]:
    """Return the level and the state of a layer with B A as its last term."""
    if scaling != 1.0 or A.dtype not in _NAMES or A.dtype != B.dtype:
        raise ValueError(
            f"the factors of {name} are {A.dtype} at scaling {scaling:g}; only 16-bit factors at "
            "scaling 1 fit a level as they are: merge the adapter instead (hf-evopress merge "
            "without --exact)"
        )
    term = Term.of("lowrank", rank=A.shape[0], factors=_NAMES[A.dtype])
    terms = () if str(layer.level) == "zero" else layer.level.terms
    state = {} if not terms else layer.state
    end = f"_{len(terms)}" if terms else ""
    level = compose.normalize(Level((*terms, term)))
    device = next(iter(layer.state.values())).device
    return level, {**state, f"A{end}": A.to(device), f"B{end}": B.to(device)}
