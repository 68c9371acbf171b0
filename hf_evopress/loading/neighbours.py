"""Packed layers of neighbouring blocks that hold the same tensors: tied, saved once, loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..methods import compose
from ..models.neighbours import any_shared, shared_tensors
from ..plans.level import Level
from ..plans.plan import Plan
from .packed import PackedWeight


def share(model: Any, layers: Mapping[str, PackedWeight]) -> None:
    """Let packed layers (by module path) hold the tensors of their neighbours where levels say so.

    Raises ValueError where two that are to be one differ. transformers ties them when it loads.
    """
    tied = shared_by(layers)
    for target, source in tied.items():
        layer, name = _split(layers, target)
        other, _ = _split(layers, source)
        mine, theirs = layer.state[name], other.state[name]
        if not mine.is_meta and not torch.equal(mine, theirs):
            raise ValueError(f"{target} and {source} are to be one tensor, and differ")
        layer._parameters[name] = other._parameters[name]
    for prefix, module in model.named_modules() if tied else ():
        start = f"{prefix}." if prefix else ""
        if (known := getattr(module, "all_tied_weights_keys", None)) is None:
            continue
        own = {
            a.removeprefix(start): b.removeprefix(start)
            for a, b in tied.items()
            if a.startswith(start)
        }
        module.all_tied_weights_keys = {**known, **own}


def shared_by(layers: Mapping[str, PackedWeight]) -> dict[str, str]:
    """Return tensor -> the one in its place, by the levels that packed layers have."""
    levels: dict[str, Level] = {path: layer.level for path, layer in layers.items()}
    return shared_tensors(levels, {path: layer.shape for path, layer in layers.items()})


def left_out(layers: Mapping[str, PackedWeight]) -> list[str]:
    """Return the names of tensors that a checkpoint leaves out, because another is the same."""
    found = []
    for target, source in shared_by(layers).items():
        layer, name = _split(layers, target)
        if layer._parameters[name] is _split(layers, source)[0]._parameters[name]:
            found.append(target)
    return found


def refuse_shared(plan: Plan) -> None:
    """Raise ValueError for a plan with shared levels, where layers are compressed one by one."""
    if (level := any_shared(compose.normalize_each(plan).values())) is not None:
        raise ValueError(
            f"level '{level}' is of two neighbouring layers together, which only a search makes: "
            "hf-evopress compress MODEL --share"
        )


def forget(model: Any, layers: Mapping[str, PackedWeight]) -> None:
    """Have transformers tie nothing of these layers, which are about to become dense."""
    tied = shared_by(layers)
    for prefix, module in model.named_modules() if tied else ():
        start = f"{prefix}." if prefix else ""
        if (known := getattr(module, "all_tied_weights_keys", None)) is not None:
            module.all_tied_weights_keys = {k: v for k, v in known.items() if start + k not in tied}


def _split(layers: Mapping[str, PackedWeight], tensor: str) -> tuple[PackedWeight, str]:
    path, _, name = tensor.rpartition(".")
    return layers[path], name
