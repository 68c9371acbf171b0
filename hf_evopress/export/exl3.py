"""A folder in EXL3, exllamav3's format: trellis codes that its kernels for GPUs read.

It holds layers at trellis levels of 1 to 8 bits with state_bits=16, rotation=128, order=mma and the
codebook mul1, mcg or 3inst, one for all, bit for bit as they are (exl3_format/tensors.py), for
weights of multiples of 128 rows and columns; biases in float16. Other layers, embedding and norms
stay dense; so does a tied head, which exllamav3 takes from the embedding. All else is refused by
name. For models whose layers exllamav3 has by the same names (exl3_format/config.py).

Written after exllamav3 1.4.1's sources and never run there as a whole: that needs a GPU. Tests
decode the folder by an oracle of their own; exllamav3's kernel for experts on CPUs, compiled as it
is, reads the packed tensors as we do (tests/benchmarks/exl3.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.resources import atomic_write
from ..methods import compose
from ..methods.base import Shape
from ..models.ends import find_ends, output_head
from ..plans.level import Level
from ..plans.plan import Plan
from .base import Export, States
from .exl3_format.config import check_architecture, quantization, storage
from .exl3_format.tensors import LEVEL, obstacles, pack
from .linears import not_linear, write_dense

TABLE = "quantization_config.json"


class EXL3Export(Export):
    """Trellis codes in EXL3, which exllamav3 reads."""

    name = "exl3"

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        plan = _without_ends(model, plan, states)
        check_plan(model, plan)
        bits: dict[str, tuple[int, int]] = {}
        for unit, level in plan.items():
            if level.is_dense:
                continue
            linear = model.get_submodule(unit)
            bits[unit] = (_params(level)["bits"], linear.weight.numel())
            try:
                tensors = pack(level, states(unit, level), _shape(model, unit))
            except ValueError as error:
                raise ValueError(f"{unit}: {error}") from error
            model.set_submodule(unit, PackedLinear(tensors, linear.bias))
        head = output_head(model)
        (book,) = {_params(plan[unit])["codebook"] for unit in bits}
        said = quantization(bits, book, head[0] if head else "lm_head")
        model.config.quantization_config = said
        model.save_pretrained(folder)
        table = said | {"tensor_storage": storage(_stored(folder))}
        atomic_write(folder / TABLE, json.dumps(table, indent=2) + "\n")

    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Raise RuntimeError unless the folder holds the plan's codes and scales, and all else."""
        there = dict(_stored(folder))
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                shape = (module.svh.numel(), module.suh.numel())
                again = pack(plan[name], states(name, plan[name]), shape)
                wrong = [k for k, t in again.items() if not _same(there.get(f"{name}.{k}"), t)]
                if wrong:
                    raise RuntimeError(f"{name}.{wrong[0]} is not what the plan says; report this")
        if lost := sorted(set(_names(model)) - set(there)):
            raise RuntimeError(f"the folder lacks {', '.join(lost[:4])}; report this")


class PackedLinear(nn.Module):
    """Holds the tensors of one layer by the names that exllamav3 reads."""

    suh: Tensor
    svh: Tensor

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        if bias is not None:
            tensors = tensors | {"bias": bias.detach().half().cpu()}
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def check_plan(model: Any, plan: Plan) -> None:
    """Raise ValueError that names the units which the format has no place for."""
    check_architecture(model)
    way_out = (
        f"compress with --for exl3, or with levels such as --level {LEVEL.format(bits=3)}, and "
        "leave what does not fit dense, or use the evopress export"
    )
    wrong = list(_obstacles(model, plan))
    if wrong:
        named = "; ".join(f"{unit}: {why}" for unit, why in wrong[:4])
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise ValueError(f"exl3 cannot hold {named}{more}; {way_out}")
    levels = [level for level in plan.levels.values() if not level.is_dense]
    if not levels:
        raise ValueError(f"exl3: the plan leaves all layers dense; {way_out}")
    books = sorted({_params(level)["codebook"] for level in levels})
    if len(books) > 1:
        raise ValueError(
            f"exl3: exllamav3 reads layers that it computes together with one codebook, and the "
            f"plan has {' and '.join(books)}: compress with one"
        )


def _obstacles(model: Any, plan: Plan) -> Iterator[tuple[str, str]]:
    others = not_linear(model, plan)
    for unit, level in plan.items():
        if unit in others:
            yield unit, others[unit]
        elif not level.is_dense and (why := "; ".join(obstacles(level, _shape(model, unit)))):
            yield unit, why


def _without_ends(model: Any, plan: Plan, states: States) -> Plan:
    """Return the plan without the ends that EXL3 has no place for, which are written dense."""
    units = {unit.name: unit for unit in find_ends(model)}
    ends = {
        name: level
        for name, level in plan.items()
        if name in units
        and not level.is_dense
        and (units[name].role != "head" or any(obstacles(level, units[name].shape)))
    }
    why = "EXL3 has no place for a packed embedding, nor for a head at other levels than its own"
    return write_dense(model, plan, states, ends, why=why)


def _stored(folder: Path) -> list[tuple[str, Tensor]]:
    """Return the tensors of a checkpoint by name."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return [pair for file in files for pair in load_file(file).items()]


def _names(model: Any) -> list[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [name for name, _ in model.named_parameters() if name not in tied]


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.dtype == b.dtype and torch.equal(a, b)


def _params(level: Level) -> dict[str, Any]:
    _, params, _ = next(compose.parts(compose.normalize(level)))
    return params


def _shape(model: Any, unit: str) -> Shape:
    rows, columns = model.get_submodule(unit).weight.shape
    return int(rows), int(columns)
