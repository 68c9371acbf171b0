"""What every method that stores integer codes shares: parameters, cost, packed tensors.

A state holds `codes` uint8 (out, packed bytes of a row), `scales` float16 or bfloat16 (out,
groups) and, if asymmetric, `zeros` uint8 (packed bytes of all zero points in one row).
For sizes divisible by 8 that is bits + (16 + bits) / group_size bits per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .grid import dequantize
from .methods.base import Method, Param, Shape, State
from .packing import pack, packed_bytes, unpack

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
        g, n = params["group_size"], shape[1]
        if g > 0 and n % g:
            fits = ", ".join(str(s) for s in GROUP_SIZES if s == -1 or n % s == 0)
            raise ValueError(
                f"{self.name}: group_size={g} does not divide the {n} inputs of a weight of "
                f"shape {tuple(shape)}; group sizes that do: {fits}"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        rows, bits, groups = shape[0], params["bits"], n_groups(shape, params["group_size"])
        zeros = 0 if params["symmetric"] else packed_bytes(rows * groups, bits)
        return 8 * (rows * packed_bytes(shape[1], bits) + zeros) + 16 * rows * groups

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        rows, bits, groups = shape[0], params["bits"], n_groups(shape, params["group_size"])
        scale = state["scales"].float().unsqueeze(-1)
        if params["symmetric"]:
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            zero = unpack(state["zeros"], bits, rows * groups).view(rows, groups, 1).float()

        def of_rows(some: slice) -> Tensor:
            q = unpack(state["codes"][some], bits, shape[1]).unflatten(-1, (groups, -1))
            return dequantize(q, scale[some], zero[some]).flatten(1).to(dtype)

        if _wants_one_graph(state["codes"], scale) or rows * shape[1] <= TILE:
            return of_rows(slice(None))
        # A tile at a time stays in the cache: 4 times faster for 4096 x 4096 on a CPU core, and
        # there is never a float32 copy of the whole weight.
        W = torch.empty(shape, dtype=dtype, device=scale.device)
        step = max(1, TILE // shape[1])
        for start in range(0, rows, step):
            W[start : start + step] = of_rows(slice(start, start + step))
        return W

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        rows, bits, groups = shape[0], params["bits"], n_groups(shape, params["group_size"])
        codes = torch.empty(rows, packed_bytes(shape[1], bits), dtype=torch.uint8, device="meta")
        scales = torch.empty(rows, groups, dtype=SCALE_DTYPES[params["scales"]], device="meta")
        if params["symmetric"]:
            return {"codes": codes, "scales": scales}
        zeros = torch.empty(packed_bytes(rows * groups, bits), dtype=torch.uint8, device="meta")
        return {"codes": codes, "scales": scales, "zeros": zeros}


def _wants_one_graph(codes: Tensor, scale: Tensor) -> bool:
    """Return whether tiles would cost more than they save: for autograd, tracers and GPUs."""
    return scale.requires_grad or torch.compiler.is_compiling() or codes.device.type != "cpu"


def n_groups(shape: Shape, group_size: int) -> int:
    """Return the number of groups in a row of a weight of `shape`."""
    return 1 if group_size == -1 else shape[1] // group_size


def pack_state(q: Tensor, scale: Tensor, zero: Tensor, **params: Any) -> State:
    """Return the state of codes q (out, in) and of scale and zero (out, groups), all float32."""
    state = {
        "codes": pack(q.to(torch.uint8), params["bits"]),
        "scales": scale.to(SCALE_DTYPES[params["scales"]]).contiguous(),
    }
    if not params["symmetric"]:
        state["zeros"] = pack(zero.to(torch.uint8).flatten(), params["bits"])
    return state
