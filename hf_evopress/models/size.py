"""The size of a model: stored bits per weight in memory, bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .ends import find_ends
from .units import find_units

# The name of an empty tensor in each compressed checkpoint. Without the plugin transformers lists
# it among the keys that it did not expect, above an error that does not say what to do.
NOTICE = "this model is compressed: pip install hf-evopress"


@dataclass(frozen=True)
class Size:
    """Stored bits of a model, as they are in memory and in its checkpoint.

    units: the linear weights inside decoder blocks, with scales, zero points, masks, factors;
    others: biases, norms, embeddings and the head, tied ones once. Weights are counted as the
    dense model has them.
    """

    unit_bits: int
    unit_weights: int
    other_bits: int
    other_weights: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the compressible weights."""
        return self.unit_bits / self.unit_weights

    @property
    def bits_per_weight_with_embeddings(self) -> float:
        """Stored bits per weight of everything the model holds."""
        return (self.unit_bits + self.other_bits) / (self.unit_weights + self.other_weights)


def model_size(model: nn.Module, *, shapes: Mapping[str, tuple[int, int]] | None = None) -> Size:
    """Return what `model` stores.

    `shapes` (unit -> (out, in), a plan's) adds the weights of dropped blocks, which the model
    no longer has, to the number of weights.
    """
    units = {unit.name: unit.shape for unit in find_units(model, in_stock_form=True)}
    ends = {unit.name: math.prod(unit.shape) for unit in find_ends(model)}  # packed, too
    seen: set[int] = set()  # tied parameters are one object under two names
    unit_bits = other_bits = other_weights = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, _, own = name.rpartition(".")
        if owner in units and own != "bias":
            unit_bits += 8 * tensor.nbytes
        else:
            other_bits += 8 * tensor.nbytes
            is_end = owner in ends and own != "bias"
            other_weights += 0 if is_end else tensor.numel()
    here = {name for name, _ in model.named_modules()}  # ends are no units, and in plans
    everything = {**units, **{u: s for u, s in (shapes or {}).items() if u not in here}}
    unit_weights = sum(rows * columns for rows, columns in everything.values())
    return Size(unit_bits, unit_weights, other_bits, other_weights + sum(ends.values()))


def stored_bytes(folder: str | Path) -> int:
    """Return the bytes of the weight files of a checkpoint folder, headers included.

    Those of the safetensors files, or of GGUF or ONNX files where there are none.
    """
    kinds = ("*.safetensors", "*.gguf", "*.onnx*")
    files = next((found for kind in kinds if (found := sorted(Path(folder).glob(kind)))), None)
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {folder}; is it a checkpoint folder?")
    return sum(file.stat().st_size for file in files)


def header_bytes(names: Iterable[str]) -> int:
    """Return an upper bound of the safetensors headers of tensors with these names.

    An entry is {"name":{"dtype":"F16","shape":[r,c],"data_offsets":[a,b]}} and a comma: 60
    characters, and at most 60 digits up to a terabyte.
    """
    return 64 + sum(len(name) + 120 for name in names)
