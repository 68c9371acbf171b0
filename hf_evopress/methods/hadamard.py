"""Codes in a rotated basis: rows times a Hadamard matrix in blocks, one scale per row.

The rotation makes a row nearly Gaussian, for which the step of least squares is known: no search,
no data, no groups (QuEST, Panferov et al. 2025, arXiv:2502.05003; as a way to round alone, QuIP#'s
incoherence, arXiv:2402.04396). What quantisation-aware training by `make_quest` exports.

Stores b-bit codes and one 16-bit scale per row: b + 16 / in bits per weight.

When to use it: after training with it. Without training it is better than `rtn:group_size=-1`,
which takes the same bytes, where a row has outliers; groups or trellis codes are better still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, Param, Shape, State
from .maths.codes import CODE_PARAMS, SCALE_DTYPES
from .maths.linalg import Stats
from .maths.packing import pack, packed_bytes, unpack
from .maths.quest import CLIP, RotatedRows, codes_of, step_of_rows, values_of


class Hadamard(Method):
    """`hadamard:bits=4`: rotated rows, rounded at the step that is best for a Gaussian."""

    name = "hadamard"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "bits": Param(int, "bits per code", choices=tuple(CLIP)),
        "block": Param(int, "inputs that are mixed", default=64, choices=(16, 32, 64, 128, 256)),
        "seed": Param(int, "of the signs", default=0, at_least=0),
        "scales": CODE_PARAMS["scales"],
    }
    examples = ("hadamard:bits=4", "hadamard:bits=3,block=32,scales=bfloat16", "hadamard:bits=2")

    def check_shape(self, shape: Shape, **params: Any) -> None:
        if shape[1] % params["block"]:
            fits = [str(b) for b in self.params["block"].choices or () if shape[1] % int(b) == 0]
            raise ValueError(
                f"hadamard: block={params['block']} does not divide the {shape[1]} inputs of a "
                f"weight of shape {tuple(shape)}; blocks that do: {', '.join(fits) or 'none'}"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return shape[0] * (8 * packed_bytes(shape[1], params["bits"]) + 16)

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        self.check_shape((W.shape[0], W.shape[1]), **params)
        bits, dtype = params["bits"], SCALE_DTYPES[params["scales"]]
        Y = RotatedRows.apply(W, params["seed"], params["block"], False)
        step = step_of_rows(Y, bits, dtype)
        codes = pack(codes_of(Y, step, bits).to(torch.uint8), bits)
        return {"codes": codes, "scales": step.to(dtype)}

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        q = unpack(state["codes"], params["bits"], shape[1])
        Y = values_of(q, state["scales"].float(), params["bits"])
        made: Tensor = RotatedRows.apply(Y, params["seed"], params["block"], True)
        return made.to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        width = packed_bytes(shape[1], params["bits"])
        scales = SCALE_DTYPES[params["scales"]]
        return {
            "codes": torch.empty(shape[0], width, dtype=torch.uint8, device="meta"),
            "scales": torch.empty(shape[0], 1, dtype=scales, device="meta"),
        }
