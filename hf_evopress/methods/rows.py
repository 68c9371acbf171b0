"""Rows at two bit-widths: those that matter most at more bits than the rest.

Rows of an embedding are tokens, and a text uses few of them often: of SmolLM2-135M's 49 152, a
tenth at 6 bits and the rest at 4 lose 0.040 nats in 15.8 MB, all at 4 bits 0.097 in 15.1 MB
(rounded to nearest). Which rows matter is known from `Stats.rows` (how often a token comes in, how
often the head is asked for it), else from the moments of the gradients at the outputs, else from
the rows' own size.

Stores one bit per row that says of which kind it is, and for each kind what `gptq` stores:
codes, scales and zero points, by GPTQ's rounding in one pass over both kinds.

When to use it: for the embedding and the output head. Rows of other layers matter about alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, Param, Shape, State
from .maths.codes import (
    CODE_PARAMS,
    SCALE_DTYPES,
    check_group_size,
    code_bits,
    decode,
    decode_rows,
    empty_codes,
    pack_state,
)
from .maths.linalg import DAMP, SINK, Stats
from .maths.obs import MAX_VALUES, Rounding, solve
from .maths.packing import pack, packed_bytes, unpack

TOP = "top_"  # how the tensors of the rows at more bits begin


class Rows(Method):
    """`rows:bits=4,top_bits=6,top=0.1,group_size=64`: a tenth of the rows have 6 bits."""

    name = "rows"
    needs_stats = True
    is_trainable = True
    can_follow = True
    params: ClassVar[Mapping[str, Param]] = {
        **CODE_PARAMS,
        "top_bits": Param(int, "bits per code of the top rows", choices=(*range(3, 9),)),
        "top": Param(float, "share of the rows that these are", default=0.1),
        "damp": Param(float, "share of the mean diagonal added", default=DAMP, at_least=0.0),
        "sink": Param(float, "weight of position 0 in the Hessian", default=SINK, at_least=0.0),
    }
    examples = (
        "rows:bits=3,top_bits=6,group_size=32",
        "rows:bits=4,top_bits=8,top=0.5,group_size=-1,symmetric=true",
    )

    def check(self, **params: Any) -> None:
        if not 0 < params["top"] < 1:
            raise ValueError(f"rows needs top, a share of the rows, in (0, 1); got {params['top']}")
        if params["top_bits"] <= params["bits"]:
            raise ValueError(
                "rows gives some rows more bits than the others; got "
                f"bits={params['bits']}, top_bits={params['top_bits']}"
            )

    def check_shape(self, shape: Shape, **params: Any) -> None:
        check_group_size(self.name, shape, params["group_size"])
        if shape[0] < 2:
            raise ValueError(f"rows needs two rows or more, got a weight of shape {tuple(shape)}")

    def uses_outputs(self, **params: Any) -> bool:
        return True

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        parts = parts_of(shape, params)
        return 8 * packed_bytes(shape[0], 1) + sum(code_bits(s, **p) for _, s, p in parts)

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        return self.compress_stacked([W], stats, **params)[0]

    def compress_stacked(
        self, Ws: Sequence[Tensor], stats: Stats | None, **params: Any
    ) -> list[State]:
        stats = self.required(stats, Ws)
        made = []
        for i, W in enumerate(Ws):
            shape = (W.shape[0], W.shape[1])
            self.check_shape(shape, **params)
            is_top = _top_rows(importance(W, stats, i), _n_top(shape[0], params["top"]))
            made.append(_rounded(W, is_top, stats, params))
        return made

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        order = torch.argsort(_is_top(state, shape[0]).byte(), descending=True, stable=True)
        parts = [
            decode(_of(state, prefix), part, dtype, **p)
            for prefix, part, p in parts_of(shape, params)
        ]
        return torch.cat(parts)[torch.argsort(order)]

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        is_top = _is_top(state, shape[0])
        before = is_top.long().cumsum(0)  # top rows up to and with this one
        (_, top_shape, top_params), (_, rest_shape, rest_params) = parts_of(shape, params)
        at = before[rows]
        top = decode_rows(_of(state, TOP), top_shape, (at - 1).clamp(min=0), dtype, **top_params)
        among = (rows - at).clamp(min=0, max=rest_shape[0] - 1)
        rest = decode_rows(_of(state, ""), rest_shape, among, dtype, **rest_params)
        return torch.where(is_top[rows].unsqueeze(-1), top, rest)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        mask = torch.empty(packed_bytes(shape[0], 1), dtype=torch.uint8, device="meta")
        made = {"top_mask": mask}
        for prefix, part, p in parts_of(shape, params):
            made |= {f"{prefix}{name}": x for name, x in empty_codes(part, **p).items()}
        return made


def importance(W: Tensor, stats: Stats, i: int) -> Tensor:
    """Return what an error of each row of W (out, in) costs, (out,) float32, up to a factor."""
    if stats.rows is not None and len(stats.rows) <= len(W):  # the last were never asked for
        return torch.nn.functional.pad(stats.rows, (0, len(W) - len(stats.rows)))
    G = stats.outputs[i] if i < len(stats.outputs) else None
    if G is not None:
        return G.diagonal()
    H = stats.gram.to(W.device)
    return ((W.float() @ H) * W.float()).sum(1)


def _rounded(W: Tensor, is_top: Tensor, stats: Stats, params: Mapping[str, Any]) -> State:
    """Return the state of W, all rows rounded in one loop over the inputs, with their own grids."""
    U = stats.inverse_factor(sink=params["sink"], damp=params["damp"])
    is_top = is_top.to(U.device)
    bits = torch.where(is_top, params["top_bits"], params["bits"])
    step = max(1, MAX_VALUES // W.shape[1])
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, own in zip(W.float().split(step), bits.split(step), strict=True):
        work = rows.T.to(U.device).contiguous()  # consumed
        rounding = Rounding(
            work,
            U,
            2.0**own - 1,
            params["group_size"],
            symmetric=params["symmetric"],
            scale_dtype=SCALE_DTYPES[params["scales"]],
            clip=True,
        )
        solve(work, U, rounding, rounding.group)
        scale, zero = rounding.grids
        found.append((rounding.codes.T, scale.T, zero.T))
    q, scale, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    state = {"top_mask": pack(is_top.to(torch.uint8), 1)}
    for prefix, _, p in parts_of((W.shape[0], W.shape[1]), params):
        some = is_top if prefix else ~is_top
        packed = pack_state(q[some], scale[some], zero[some], **p)
        state |= {f"{prefix}{name}": tensor for name, tensor in packed.items()}
    return state


def parts_of(shape: Shape, params: Mapping[str, Any]) -> list[tuple[str, Shape, dict[str, Any]]]:
    """Return (prefix, shape, parameters of its codes) of the top rows and of the rest."""
    n = _n_top(shape[0], params["top"])
    return [
        (TOP, (n, shape[1]), {**params, "bits": params["top_bits"]}),
        ("", (shape[0] - n, shape[1]), dict(params)),
    ]


def _n_top(rows: int, share: float) -> int:
    return min(rows - 1, max(1, round(rows * share)))


def _top_rows(matters: Tensor, n: int) -> Tensor:
    """Return (out,) bool of the n rows that matter most; of equals, those that come first."""
    order = torch.argsort(matters.float(), descending=True, stable=True)
    is_top = torch.zeros(len(matters), dtype=torch.bool, device=matters.device)
    is_top[order[:n]] = True
    return is_top


def _is_top(state: State, rows: int) -> Tensor:
    return unpack(state["top_mask"], 1, rows).bool()


def _of(state: State, prefix: str) -> State:
    """Return codes, scales and zero points of one kind of row."""
    names = ("codes", "scales", "zeros")
    return {name: state[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in state}
