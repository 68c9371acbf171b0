"""Base class of methods that store integer codes: parameters, cost, packed tensors.

A state holds `codes` uint8 (out, packed bytes of a row), `scales` float16 or bfloat16 (out,
groups) and, if asymmetric, `zeros` uint8 (packed bytes of all zero points in one row).
For sizes divisible by 8 that is bits + (16 + bits) / group_size bits per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Grid, Method, Param, Shape, State
from .grid import dequantize
from .packing import pack, packed_bytes, unpack, unpack_at

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TILE = 2**18  # weights decompressed at once on a CPU
GROUP_SIZES = (32, 64, 96, 128, 192, 256, -1)  # what an error suggests; others work too

CODE_PARAMS: Mapping[str, Param] = {
    "bits": Param(int, "bits per code", choices=(2, 3, 4, 5, 6, 7, 8)),
    "group_size": Param(int, "weights that share a scale, -1 for a whole row", at_least=-1),
    "symmetric": Param(bool, "fixed zero point, none is stored", default=False),
    "scales": Param(str, "dtype of the scales", default="float16", choices=tuple(SCALE_DTYPES)),
}


class CodedMethod(Method):
    """A method whose state is codes, scales and zero points; subclasses choose the codes."""

    params: ClassVar[Mapping[str, Param]] = CODE_PARAMS
    can_follow = True
    is_trainable = True

    def check(self, **params: Any) -> None:
        if params["group_size"] == 0:
            raise ValueError(f"{self.name} needs group_size > 0, or -1 for a whole row; got 0")

    def check_shape(self, shape: Shape, **params: Any) -> None:
        check_group_size(self.name, shape, params["group_size"])

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return code_bits(shape, **params)

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        return decode(state, shape, dtype, **params)

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        return decode_rows(state, shape, rows, dtype, **params)

    def codes(self, state: State, shape: Shape, **params: Any) -> Grid:
        q = unpack(state["codes"], params["bits"], shape[1])
        return q, *unpack_grid(state, shape, **params)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        return empty_codes(shape, **params)


def code_bits(shape: Shape, **params: Any) -> int:
    """Return the bits that codes, scales and zero points of a weight of `shape` take."""
    return 8 * shape[0] * packed_bytes(shape[1], params["bits"]) + grid_bits(shape, **params)


def empty_codes(shape: Shape, **params: Any) -> State:
    """Return `codes`, `scales` and, unless symmetric, `zeros` on the meta device."""
    width = packed_bytes(shape[1], params["bits"])
    codes = torch.empty(shape[0], width, dtype=torch.uint8, device="meta")
    return {"codes": codes} | empty_grid(shape, **params)


def decode(state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
    """Return the weight (out, in) of codes, scales and zero points."""
    rows, bits, groups = shape[0], params["bits"], n_groups(shape, params["group_size"])
    scale, zero = unpack_grid(state, shape, **params)

    def of_rows(some: slice) -> Tensor:
        q = unpack(state["codes"][some], bits, shape[1]).unflatten(-1, (groups, -1))
        return dequantize(q, scale[some], zero[some]).flatten(1).to(dtype)

    if wants_one_graph(scale) or rows * shape[1] <= TILE:
        return of_rows(slice(None))
    # A tile at a time stays in the cache: 4 times faster for 4096 x 4096 on a CPU core, and
    # there is never a float32 copy of the whole weight.
    W = torch.empty(shape, dtype=dtype, device=scale.device)
    step = max(1, TILE // shape[1])
    for start in range(0, rows, step):
        W[start : start + step] = of_rows(slice(start, start + step))
    return W


def decode_rows(
    state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
) -> Tensor:
    """Return rows (n,) of the weight of codes, scales and zero points, (n, in)."""
    groups = n_groups(shape, params["group_size"])
    scale, zero = grid_rows(state, shape, rows, **params)
    q = unpack(state["codes"][rows], params["bits"], shape[1]).unflatten(-1, (groups, -1))
    return dequantize(q, scale, zero).flatten(1).to(dtype)


def wants_one_graph(floats: Tensor) -> bool:
    """Return whether tiles would cost more than they save: for autograd, tracers and GPUs."""
    return floats.requires_grad or torch.compiler.is_compiling() or floats.device.type != "cpu"


def n_groups(shape: Shape, group_size: int) -> int:
    """Return the number of groups in a row of a weight of `shape`."""
    return 1 if group_size == -1 else shape[1] // group_size


def pack_state(q: Tensor, scale: Tensor, zero: Tensor, **params: Any) -> State:
    """Return the state of codes q (out, in) and of scale and zero (out, groups), all float32."""
    return {"codes": pack(q.to(torch.uint8), params["bits"])} | pack_grid(scale, zero, **params)


def grid_bits(shape: Shape, **params: Any) -> int:
    """Return the bits that scales and zero points of a weight of `shape` take."""
    groups = shape[0] * n_groups(shape, params["group_size"])
    zeros = 0 if params["symmetric"] else packed_bytes(groups, params["bits"])
    return 16 * groups + 8 * zeros


def empty_grid(shape: Shape, **params: Any) -> State:
    """Return `scales` and, unless symmetric, `zeros` on the meta device."""
    rows, groups = shape[0], n_groups(shape, params["group_size"])
    scales = torch.empty(rows, groups, dtype=SCALE_DTYPES[params["scales"]], device="meta")
    if params["symmetric"]:
        return {"scales": scales}
    width = packed_bytes(rows * groups, params["bits"])
    return {"scales": scales, "zeros": torch.empty(width, dtype=torch.uint8, device="meta")}


def pack_grid(scale: Tensor, zero: Tensor, **params: Any) -> State:
    """Return scale and zero (out, groups) float32 as `scales` and, unless symmetric, `zeros`."""
    state = {"scales": scale.to(SCALE_DTYPES[params["scales"]]).contiguous()}
    if not params["symmetric"]:
        state["zeros"] = pack(zero.to(torch.uint8).flatten(), params["bits"])
    return state


def unpack_grid(state: State, shape: Shape, **params: Any) -> tuple[Tensor, Tensor]:
    """Return scale and zero, each (out, groups, 1) float32, of the groups of a weight."""
    rows, bits, groups = shape[0], params["bits"], n_groups(shape, params["group_size"])
    scale = state["scales"].float().unsqueeze(-1)
    if params["symmetric"]:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, unpack(state["zeros"], bits, rows * groups).view(rows, groups, 1).float()


def grid_rows(state: State, shape: Shape, rows: Tensor, **params: Any) -> tuple[Tensor, Tensor]:
    """Return scale and zero, each (n, groups, 1) float32, of some rows (n,) of a weight."""
    bits, groups = params["bits"], n_groups(shape, params["group_size"])
    scale = state["scales"][rows].float().unsqueeze(-1)
    if params["symmetric"]:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    index = rows.unsqueeze(-1) * groups + torch.arange(groups, device=rows.device)
    zero = unpack_at(state["zeros"], bits, shape[0] * groups, index)
    return scale, zero.unsqueeze(-1).float()


def check_group_size(name: str, shape: Shape, group_size: int) -> None:
    """Raise ValueError that names sizes that fit where groups do not divide the inputs."""
    n = shape[1]
    if group_size > 0 and n % group_size:
        fits = ", ".join(str(s) for s in GROUP_SIZES if s == -1 or n % s == 0)
        raise ValueError(
            f"{name}: group_size={group_size} does not divide the {n} inputs of a weight of "
            f"shape {tuple(shape)}; group sizes that do: {fits}"
        )
