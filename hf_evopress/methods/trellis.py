"""Trellis codes: rotate a weight until it looks Gaussian, then code it 256 numbers at a time.

QTIP (Tseng, Sun, Hou and De Sa 2024, arXiv:2406.11235) with the two-sided rounding of YAQA (the
same, 2025, arXiv:2505.22988). W = s Q_o^T Y Q_i: Q are rotations with a formula
(`maths/rotation.py`), Y consists of tiles of 16 x 16, each one walk through a trellis of
2^state_bits states (`maths/walks.py`), found by Viterbi's algorithm; each state stands for a value
(`maths/codebook.py`). Errors of a tile are absorbed by later ones along the inputs and, where the
statistics know the outputs' moments, along the outputs (`maths/two_sided.py`).

Stores exactly `bits` per weight of whole tiles and a scale of 32 bits; without tail_biting also
state_bits - bits per tile (half bits rounded up). Sides that 16 does not divide are padded to whole
tiles, and the padding is stored. With scales=channels W is diag(a) Q_o^T Y Q_i diag(b), and 16 bits
for each row and each column are stored instead of the one scale (`maths/channel_scales.py`). Making
a weight takes 2^state_bits steps per weight, whatever the bits.

The weight is computed in float32 by sums and products in a fixed order: the same numbers on every
machine. It is scored, shipped and run as that weight; `product` rotates the
activations instead, which is the same but for the order of sums.

When to use it: 1 to 5 bits, wherever quality per byte matters most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import PART, Param, Shape, SharedWork, State
from .maths.codebook import CODEBOOKS, codebook
from .maths.linalg import DAMP, SINK, Stats
from .maths.rotation import factors
from .maths.tile_order import ORDERS, in_rows
from .maths.trellis_rounding import (
    FEEDBACKS,
    ROTATIONS,
    block_of,
    rotate_inputs,
    round_weights,
    unrotate_outputs,
    unrotate_sides,
)
from .maths.two_sided import DAMP_OUTPUTS, TILE
from .maths.walks import BITS, LENGTH, own_bits, start_bytes, unpack_walks, walk_bytes

MAX_STATE_BITS = 16
MAX_ODD = 1024  # of a side: rotating takes its square in memory, and as much time per weight
SCALES = ("tensor", "channels")
_PIECE = 2**18  # weights whose walks are read at once on a CPU: they stay in its cache
_LARGE = 2**24  # and elsewhere, where each piece is a dozen launches


class Trellis(SharedWork):
    """`trellis:bits=3`: walks through a trellis in a rotated basis, rounded on both sides."""

    name = "trellis"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "bits": Param(float, "bits per weight", choices=BITS),
        "state_bits": Param(
            int, "log2 of the trellis' states", default=12, at_least=4, at_most=MAX_STATE_BITS
        ),
        "codebook": Param(str, "values of the states", default="strata", choices=CODEBOOKS),
        "rotation": Param(
            str, "size of the rotations, or 'full'", default="full", choices=ROTATIONS
        ),
        "order": Param(
            str, "in which a walk visits its tile; mma: as EXL3", default="rows", choices=ORDERS
        ),
        "scales": Param(str, "one, or one per row and column", default="tensor", choices=SCALES),
        "seed": Param(int, "of the rotations' signs", default=0, at_least=0, at_most=2**30),
        "tail_biting": Param(bool, "a walk's start is its end, none is stored", default=True),
        "feedback": Param(
            str,
            "whose moments guide the rounding; 'both' does without outputs where G is unknown",
            default="both",
            choices=FEEDBACKS,
        ),
        "damp": Param(float, "share of H's mean diagonal added", default=DAMP, at_least=0.0),
        "damp_outputs": Param(
            float, "share of G's mean diagonal added", default=DAMP_OUTPUTS, at_least=0.0
        ),
        "sink": Param(float, "weight of position 0 in H", default=SINK, at_least=0.0),
    }
    examples = (
        "trellis:bits=3,state_bits=8",
        "trellis:bits=2,codebook=mul1,state_bits=6,tail_biting=false,sink=0.0",
        "trellis:bits=4,rotation=none,state_bits=5,feedback=none,codebook=gauss",
        "trellis:bits=3,state_bits=7,scales=channels,order=mma,codebook=mcg",
        "trellis:bits=3,state_bits=6,codebook=weyl",
        "trellis:bits=2.5,state_bits=7",
        "trellis:bits=1.5,state_bits=6,codebook=weyl,tail_biting=false,order=mma",
    )

    def check(self, **params: Any) -> None:
        if own_bits(params["bits"])[1] > params["state_bits"]:
            raise ValueError(
                f"trellis needs state_bits >= bits: a state holds the last bits of its walk; got "
                f"bits={params['bits']}, state_bits={params['state_bits']}"
            )

    def check_shape(self, shape: Shape, **params: Any) -> None:
        block = block_of(params["rotation"])
        for n, side in zip(shape, ("outputs", "inputs"), strict=True):
            if block and n % block:
                raise ValueError(
                    f"trellis: rotation={block} does not divide the {n} {side} of a weight of "
                    f"shape {tuple(shape)}; use rotation=full, which fits every size"
                )
            if params["rotation"] == "full" and (odd := factors(n)[1]) > MAX_ODD:
                raise ValueError(
                    f"trellis: {n} {side} have the odd factor {odd}, and rotation=full mixes so "
                    f"many parts with one another: {MAX_ODD} at most; use rotation=none"
                )

    def uses_stats(self, **params: Any) -> bool:
        return params["feedback"] != "none"

    def uses_outputs(self, **params: Any) -> bool:
        return params["feedback"] == "both"

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        rows, columns = _tiles(shape)
        starts = 0
        if not params["tail_biting"]:
            starts = start_bytes(rows * columns, params["bits"], params["state_bits"])
        scales = 16 * sum(shape) if params["scales"] == "channels" else 32
        return 8 * (rows * columns * walk_bytes(params["bits"]) + starts) + scales

    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input.

        Settings that differ in how a walk is stored share rotated weights and factors, and all
        weights are rounded in step: the more tiles at once, the more threads have work.
        """
        for params in settings:
            if self.uses_stats(**params):
                self.required(stats, Ws)
            for W in Ws:
                self.check_shape((W.shape[0], W.shape[1]), **params)
        return round_weights(Ws, stats, settings)

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        Y = rotated_weight(state, shape, **params)
        W = unrotate_sides(Y, params["rotation"], params["seed"])
        if params["scales"] == "channels":
            W = W * state["row_scales"].float().unsqueeze(1) * state["column_scales"].float()
        else:
            W = W * state["scale"]
        return W.to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        rows, columns = _tiles(shape)
        bits = params["bits"]
        state = {
            "codes": torch.empty(rows, columns, walk_bytes(bits), dtype=torch.uint8, device="meta"),
            **_empty_scales(shape, params["scales"]),
        }
        if not params["tail_biting"]:
            size = start_bytes(rows * columns, bits, params["state_bits"])
            state["starts"] = torch.empty(size, dtype=torch.uint8, device="meta")
        return state

    def product(self, x: Tensor, state: State, shape: Shape, **params: Any) -> Tensor:
        # x is rotated in the place of the weight: the same to about 1e-6 of |W| |x|
        a, b = state["scale" if "scale" in state else "row_scales"], state.get("column_scales")
        flat = (x.float() if b is None else x.float() * b).T
        z = rotate_inputs(flat, params["rotation"], params["seed"])
        piece = _PIECE if x.device.type == "cpu" else PART
        slabs = (part.flatten(2).flatten(0, 1) for _, part in _slabs(state, shape, piece, **params))
        y = torch.cat([slab[:, : shape[1]] @ z for slab in slabs])[: shape[0]]
        return unrotate_outputs(y, params["rotation"], params["seed"]).T * a


def rotated_weight(state: State, shape: Shape, **params: Any) -> Tensor:
    """Return Y (out, in) float32, the codebook's values in the rotated basis, without the scale."""
    rows, columns = _tiles(shape)
    device = state["codes"].device
    Y = torch.empty(rows, TILE, columns, TILE, dtype=torch.float32, device=device)
    for low, part in _slabs(state, shape, _PIECE if device.type == "cpu" else _LARGE, **params):
        Y[low : low + len(part)] = part
    return Y.view(rows * TILE, columns * TILE)[: shape[0], : shape[1]]


def _slabs(state: State, shape: Shape, piece: int, **params: Any) -> Iterator[tuple[int, Tensor]]:
    """Yield rows of tiles of Y, of about `piece` weights: the first one's number and
    (n, 16, columns, 16) float32."""
    (rows, columns), bits, state_bits = _tiles(shape), params["bits"], params["state_bits"]
    codes, wanted = state["codes"], (rows, columns, walk_bytes(bits))
    if codes.shape != wanted:
        raise ValueError(
            f"trellis: a weight of shape {tuple(shape)} at {bits} bits has codes of shape "
            f"{wanted}, got {tuple(codes.shape)}"
        )
    if (state.get("starts") is None) != params["tail_biting"]:
        raise ValueError(f"trellis: tail_biting={params['tail_biting']}, and starts do not fit it")
    values = codebook(params["codebook"], state_bits, bits, codes.device)
    step = rows
    if params["tail_biting"]:  # starts lie in one string for all
        step = max(1, piece // (columns * LENGTH))
    for low in range(0, rows, step):
        part = codes[low : low + step].flatten(0, 1)
        walks = unpack_walks(part, bits, state_bits, state.get("starts"))
        tiles = in_rows(values.index_select(0, walks.flatten()).view(-1, LENGTH), params["order"])
        tiles = tiles.view(-1, columns, TILE, TILE).transpose(1, 2)
        yield low, tiles


def _empty_scales(shape: Shape, scales: str) -> State:
    if scales == "tensor":
        return {"scale": torch.empty(1, dtype=torch.float32, device="meta")}
    names = ("row_scales", "column_scales")
    return {
        name: torch.empty(n, dtype=torch.float16, device="meta")
        for name, n in zip(names, shape, strict=True)
    }


def _tiles(shape: Shape) -> tuple[int, int]:
    """Return how many tiles a weight has from top to bottom and from left to right."""
    return -(-shape[0] // TILE), -(-shape[1] // TILE)
