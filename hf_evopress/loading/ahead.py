"""Read packed tensors before transformers reads the rest of a checkpoint.

Its loop takes 0.3 ms of Python per tensor, most of it to compile a regular expression of the name,
and a packed layer has three tensors where a dense one has one. So packed linear layers of a model
that stays on the CPU get theirs at once, from the file as it is mapped into memory, and hide them
from the loop until it is done. All others are loaded by the loop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..base.ranks import is_in_group
from ..store.header import Entry
from ..store.mapped import mapped
from .file_names import FileNames
from .layers import CompressedLinear
from .packed import PackedWeight


def read_ahead(
    model: Any, tensors: Sequence[Entry], names: FileNames, device_map: Any
) -> list[str]:
    """Give packed linear layers their tensors; return the names of those in the model."""
    if not _stays_here(device_map):
        return []
    prefix = f"{model.base_model_prefix}."
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    places: dict[str, tuple[PackedWeight, str]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and not layer.is_tied:
            names_of = {f"{path}.{name}": name for name in layer.state}
            if tied_names.isdisjoint(names_of):
                places |= {full.removeprefix(prefix): (layer, n) for full, n in names_of.items()}
    wanted = {
        entry: key
        for entry in tensors
        if (full := names.in_model.get(entry.name)) is not None  # else it is to be converted
        and (key := full.removeprefix(prefix)) in places
    }
    found = []
    hidden: dict[PackedWeight, set[str]] = {}
    for entry, tensor in mapped(wanted):
        layer, name = places[wanted[entry]]
        if _give(layer, name, tensor):
            hidden.setdefault(layer, set()).add(name)
            found.append(wanted[entry])
    for layer, own in hidden.items():
        layer.hidden = frozenset(own)
    return found


def show_again(model: nn.Module) -> None:
    """Let tensors that were read ahead be part of the model's state again."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.hidden = frozenset()


def _stays_here(device_map: Any) -> bool:
    """Return whether all goes to the CPU of this process, which reads files by mapping them."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
    is_mapped = sys.platform != "win32"
    return is_mapped and not is_in_group() and all(str(p) == "cpu" for p in places)


def _give(layer: PackedWeight, name: str, tensor: Tensor) -> bool:
    """Put a tensor of a file in its place; return False for one of another kind."""
    expected = layer._parameters[name]
    assert expected is not None  # it is of the layer's state
    if tensor.shape != expected.shape:
        return False
    if tensor.dtype != expected.dtype:
        if not (tensor.is_floating_point() and expected.is_floating_point()):
            return False
        tensor = tensor.to(expected.dtype)
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    layer._parameters[name] = parameter
    return True
