"""Checks of a loaded checkpoint: missing, damaged or unplanned tensors raise errors."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..models.dropped import dropped_modules, dropped_units
from ..plans.plan import Plan
from ..store.checksums import checksum
from ..store.header import Entry
from ..store.mapped import DTYPES
from .file_names import FileNames, as_written
from .layers import compressed_layers, planned_levels
from .packed import fixed_dtype


def check_shapes(model: Any, tensors: Iterable[Entry], names: FileNames) -> None:
    """Raise ValueError that names packed tensors that have another shape or dtype in the files.

    transformers reports some of them, reads others from disk as they are, and draws random
    numbers for the rest if it is told to ignore mismatches.
    """
    prefix = f"{model.base_model_prefix}."
    expected = {}
    for path, layer in compressed_layers(model).items():
        fixed = fixed_dtype(layer.level, layer.shape)
        for name, tensor in layer.own_tensors():
            like = tuple(tensor.shape), tensor.dtype if name in fixed else None
            expected[f"{path.removeprefix(prefix)}.{name}"] = like
    wrong = []
    for entry in tensors:
        shape, dtype = expected.get(names.of_model(entry.name).removeprefix(prefix), (None, None))
        if shape is None or not entry.n_bytes:
            continue
        if entry.shape != shape:
            wrong.append(f"{entry.name} is {entry.shape}, not {shape}")
        elif dtype is not None and _is_relabelled(entry, dtype):
            wrong.append(f"{entry.name} is of {entry.dtype}, not {dtype}")
    if wrong:
        raise ValueError(
            f"{len(wrong)} packed tensors in the checkpoint do not have the shape or dtype of "
            f"their level: {'; '.join(wrong[:8])}; download or export it again"
        )


def _is_relabelled(entry: Entry, dtype: torch.dtype) -> bool:
    """Return whether the bytes of a tensor, all that checksums cover, are called other numbers.

    Another size is none of that: scales that are saved while they are trained are float32.
    """
    as_large = entry.n_bytes == prod(entry.shape) * dtype.itemsize
    return as_large and DTYPES.get(entry.dtype) != dtype


def check_loaded(model: Any, plan: Plan) -> None:
    """Raise ValueError that names packed tensors that the checkpoint did not bring."""
    check_levels_match(model, plan)
    missing = []
    for path, layer in compressed_layers(model).items():
        for name, tensor in layer.own_tensors():
            full = f"{path}.{name}"
            loaded = getattr(tensor, "_is_hf_initialized", False)
            if not loaded and not _is_offloaded(model, full, tensor):
                missing.append(full)
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(
            f"the checkpoint lacks {len(missing)} packed tensors, or has them in another shape: "
            f"{', '.join(missing[:8])}{more}; download or export it again"
        )


def check_levels_match(model: Any, plan: Plan) -> None:
    planned, layers = planned_levels(model, plan), compressed_layers(model)
    wrong = sorted(set(layers) - set(planned))
    wrong += [n for n, v in planned.items() if n not in layers or layers[n].level != v]
    if len(gone := dropped_modules(model)) != len(wanted := dropped_units(plan)):
        raise ValueError(
            f"the plan drops {', '.join(wanted) or 'nothing'}; "
            f"the model has dropped {', '.join(gone) or 'nothing'}"
        )
    if wrong:
        raise ValueError(
            f"{len(wrong)} layers do not hold the level that the plan gives them: "
            f"{', '.join(wrong[:8])}"
        )


def _is_offloaded(model: Any, name: str, tensor: Tensor) -> bool:
    """Return whether a tensor on the meta device is there to be read from disk."""
    if not tensor.is_meta:
        return False
    try:
        return on_cpu(model, name, tensor).shape == tensor.shape
    except (KeyError, ValueError):
        return False


def on_cpu(model: Any, name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def never_saved(model: Any) -> set[str]:
    """Return the names of tensors that transformers leaves out of checkpoints and makes anew.

    Such as the position embeddings of Marian, which are sines.
    """
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def checksums_of_written(model: Any, state: dict[str, Tensor]) -> dict[str, str]:
    """Return name in the file -> checksum, of tensors that save_pretrained is to write.

    A tensor that is offloaded and written otherwise than it is has none.
    """
    own, found = {id(tensor): name for name, tensor in state.items()}, {}
    for name, tensor in as_written(model, state).items():
        if id(tensor) in own:
            tensor = on_cpu(model, own[id(tensor)], tensor)
        if not tensor.is_meta:
            found[name] = tensor_checksum(tensor)
    return found


def tensor_checksum(tensor: Tensor) -> str:
    """Return the checksum of a tensor as `store.checksums` gives it for one in a file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return checksum(flat.view(torch.uint8).numpy().data, list(tensor.shape))
