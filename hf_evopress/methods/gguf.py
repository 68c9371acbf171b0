"""The tensor types of GGUF files: what llama.cpp runs, with error feedback at the same bytes.

Scales are chosen by ggml's own encoder with an importance matrix from the calibration. With
`feedback` codes are then rounded anew, one input at a time, and the inputs not yet rounded absorb
the error, as in GPTQ, and so do later rows where the outputs' moments are known; without it codes
are those that ggml makes.

Stores exactly the bytes of the GGUF tensor: 4.5 bits per weight at q4_0, q4_k and iq4_nl, 5.5 at
q5_0 and q5_k, 8.5 at q8_0, 2.06 at iq2_xxs. Types with k in their name and the iq types but iq4_nl
have blocks of 256 weights, the others of 32; a row has to be a multiple of that.

When to use it: for models that llama.cpp or another program on GGUF files is to run; see
`hf-evopress export --format gguf`. Making levels needs `pip install "hf-evopress[gguf]"`, running
them only torch (iq1, iq2 and iq3 types: the `gguf` package as well).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, Param, Shape, State
from .maths.ggml import feedback, lattice
from .maths.ggml.encoder import encode
from .maths.ggml.scalar import LAYOUTS
from .maths.ggml.types import KINDS, NEED_IMPORTANCE, cut_blocks, fitting
from .maths.linalg import DAMP, SINK, Stats
from .maths.row_groups import OUTPUT_PARAMS, round_rows

_PIECE = 2**18  # weights decoded at once on a CPU


class GGUF(Method):
    """`gguf:type=q4_k`: a tensor type of llama.cpp, encoded by ggml."""

    name = "gguf"
    needs_stats = True
    params: ClassVar[Mapping[str, Param]] = {
        "type": Param(str, "a tensor type of GGUF files", choices=tuple(KINDS)),
        "feedback": Param(bool, "later inputs absorb the errors of earlier ones", default=True),
        "damp": Param(float, "share of the mean diagonal added", default=DAMP, at_least=0.0),
        "sink": Param(float, "weight of position 0 in the Hessian", default=SINK, at_least=0.0),
        **OUTPUT_PARAMS,
    }
    examples = (
        "gguf:type=q4_0",
        "gguf:type=q5_1",
        "gguf:type=iq4_nl",
        "gguf:type=q4_1,feedback=false",
        "gguf:type=q8_0,damp=0.1,sink=0.0",
        "gguf:type=q5_0,outputs=false",
    )

    def check_shape(self, shape: Shape, **params: Any) -> None:
        kind = KINDS[params["type"]]
        if shape[1] % kind.block:
            others = ", ".join(fitting(shape[1])) or "none"
            raise ValueError(
                f"gguf: type={kind.name} has blocks of {kind.block} weights, and the {shape[1]} "
                f"inputs of a weight of shape {tuple(shape)} are no multiple of that; types that "
                f"fit: {others}"
            )

    def uses_stats(self, **params: Any) -> bool:
        return params["feedback"] or params["type"] in NEED_IMPORTANCE

    def uses_outputs(self, **params: Any) -> bool:
        return bool(params["feedback"] and params["outputs"])

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return 8 * shape[0] * KINDS[params["type"]].row_bytes(shape[1])

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        return self.compress_stacked([W], stats, **params)[0]

    def compress_stacked(
        self, Ws: Sequence[Tensor], stats: Stats | None, **params: Any
    ) -> list[State]:
        """Return the states of weights that share one input; their rows go through one loop."""
        if self.uses_stats(**params):
            stats = self.required(stats, Ws)
        for W in Ws:
            self.check_shape((W.shape[0], W.shape[1]), **params)
        kind = KINDS[params["type"]]
        if params["feedback"] and stats is not None:
            U = stats.inverse_factor(sink=params["sink"], damp=params["damp"])
            made = round_rows(
                [W.to(U.device, torch.float32) for W in Ws],
                stats.outputs if params["outputs"] else None,
                params["damp_outputs"],
                lambda rows: (feedback.round_rows(kind, rows[0], U).unsqueeze(0),),
                lambda made: _decode(made[0][0], **params).unsqueeze(0),
            )
            return [{"blocks": blocks[0].clone()} for (blocks,) in made]
        rows = torch.cat([W.float() for W in Ws])
        weight = None if stats is None else stats.hessian(sink=params["sink"]).diagonal()
        blocks = encode(kind, rows, weight).to(rows.device)
        return [{"blocks": part.clone()} for part in blocks.split([W.shape[0] for W in Ws])]

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        blocks = state["blocks"]
        if blocks.device.type != "cpu" or torch.compiler.is_compiling():
            return _decode(blocks, **params).to(dtype)
        W = torch.empty(shape, dtype=dtype)
        step = max(1, _PIECE // shape[1])
        for low in range(0, shape[0], step):
            W[low : low + step] = _decode(blocks[low : low + step], **params)
        return W

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        return _decode(state["blocks"][rows], **params).to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        width = KINDS[params["type"]].row_bytes(shape[1])
        return {"blocks": torch.empty(shape[0], width, dtype=torch.uint8, device="meta")}


def _decode(rows: Tensor, **params: Any) -> Tensor:
    """Return the weights (n, in) float32 of rows of bytes (n, row bytes) uint8."""
    kind = KINDS[params["type"]]
    blocks, layout = cut_blocks(rows, kind), LAYOUTS.get(kind.name)
    if layout is not None:
        return layout.decode(blocks).flatten(1)
    return lattice.decode(kind.name, blocks).flatten(1)
