"""A stack of blocks, each the signs of what is left times a low-rank size: any prefix is a weight.

BitStack (Wang et al. 2024, arXiv:2410.23918). With inputs scaled by their root mean square s, block
i takes the residual R and stores sign(R) and the best rank-r fit L_i A_i of |R|; the next one takes
R - sign(R) * (L_i A_i). The weight of n blocks is the sum of the first n, divided by s again. The
first n blocks of a longer stack are the stack of n: one file holds every size.

Stores per block one bit per weight and 16 r (out + in) bits of factors, half of that and r scales
with factors=int8, and once 16 in bits of s: 1.06 bits per block of 576 x 576 at rank 1.

When to use it: where one checkpoint has to fit many memories, or shed blocks while it runs. At a
single size codes made for that size lose less (`gptq` from 3 bits on, `trellis` at all).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Param, Shape, SharedWork, State
from .maths.decompositions import eigh
from .maths.factors import KINDS, empty_factor, factor_bits, pack_factor, unpack_factor
from .maths.linalg import SINK, Stats
from .maths.packing import pack, packed_bytes, unpack

MOST_BLOCKS = 16


class BitStack(SharedWork):
    """`bitstack:blocks=4`: four sign blocks of rank 1, about 4.3 bits per weight."""

    name = "bitstack"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "blocks": Param(int, "how many blocks are added up", at_least=1, at_most=MOST_BLOCKS),
        "rank": Param(int, "rank of the sizes of a block", default=1, at_least=1, at_most=64),
        "factors": Param(str, "how sizes are stored", default="float16", choices=KINDS),
        "scaled": Param(bool, "inputs count by their size", default=True),
        "sink": Param(float, "weight of position 0 in that size", default=SINK, at_least=0.0),
    }
    examples = (
        "bitstack:blocks=3",
        "bitstack:blocks=2,rank=4,factors=int8,sink=0.0",
        "bitstack:blocks=4,rank=2,factors=bfloat16,scaled=false",
    )

    def uses_stats(self, **params: Any) -> bool:
        return params["scaled"]

    def check(self, **params: Any) -> None:
        if not params["scaled"] and params["sink"] != self.params["sink"].default:
            raise ValueError("bitstack: sink means nothing with scaled=false; leave it out")

    def check_shape(self, shape: Shape, **params: Any) -> None:
        if params["rank"] > min(shape):
            raise ValueError(
                f"bitstack: a weight of shape {tuple(shape)} has at most rank {min(shape)}, got "
                f"rank={params['rank']}"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        scale = 16 * shape[1] if params["scaled"] else 0
        return params["blocks"] * block_bits(shape, **params) + scale

    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input.

        Settings that differ in `blocks` only are prefixes of the longest among them.
        """
        longest: dict[tuple[Any, ...], int] = {}
        for params in settings:
            if self.uses_stats(**params):
                self.required(stats, Ws)
            for W in Ws:
                self.check_shape((W.shape[0], W.shape[1]), **params)
            key = _without_blocks(params)
            longest[key] = max(longest.get(key, 0), params["blocks"])
        stacks = {
            key: [_stack(W, stats, {**dict(key), "blocks": n}) for W in Ws]
            for key, n in longest.items()
        }
        return [
            [prefix(stack, params["blocks"]) for stack in stacks[_without_blocks(params)]]
            for params in settings
        ]

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        return _weight(state, shape, params).to(dtype)

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        return _weight(state, shape, params, rows).to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        (rows, columns), rank, kind = shape, params["rank"], params["factors"]
        state: State = {}
        for block in range(params["blocks"]):
            signs = torch.empty(rows, packed_bytes(columns, 1), dtype=torch.uint8, device="meta")
            state[f"{name_of(block)}_signs"] = signs
            state |= empty_factor(f"{name_of(block)}_sizes", rank, rows + columns, kind)
        if params["scaled"]:
            state["input_scale"] = torch.empty(columns, dtype=torch.float16, device="meta")
        return state


def name_of(block: int) -> str:
    """Return how the names of a block's tensors begin; the first block is number 0."""
    return f"block{block}"


def block_bits(shape: Shape, **params: Any) -> int:
    """Return the bits that one block of a weight of `shape` takes."""
    sizes = factor_bits(params["rank"], sum(shape), params["factors"])
    return 8 * shape[0] * packed_bytes(shape[1], 1) + sizes


def prefix(state: State, blocks: int) -> State:
    """Return the tensors of the first `blocks` blocks of a stack."""
    names = tuple(f"{name_of(block)}_" for block in range(blocks))
    return {n: t for n, t in state.items() if n == "input_scale" or n.startswith(names)}


def _without_blocks(params: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((key, value) for key, value in sorted(params.items()) if key != "blocks")


def _stack(W: Tensor, stats: Stats | None, params: Mapping[str, Any]) -> State:
    """Return all blocks of W (out, in)."""
    shape, state, left = (W.shape[0], W.shape[1]), {}, W.float().clone()
    if params["scaled"]:
        assert stats is not None  # compress_many has asked for them
        state["input_scale"] = _input_scale(stats.hessian(sink=params["sink"]))
        left /= state["input_scale"].float()
    for block in range(params["blocks"]):
        signs = left >= 0
        state[f"{name_of(block)}_signs"] = pack(signs.to(torch.uint8), 1)
        sizes = torch.cat(_best_fit(left.abs(), params["rank"]), dim=1)
        state |= pack_factor(f"{name_of(block)}_sizes", sizes, params["factors"])
        left -= _block(state, block, shape, params)
    return state


def _input_scale(H: Tensor) -> Tensor:
    """Return the largest input's root mean square over that of each input, (in,) float16.

    2^10 at most, which is what inputs get that are never on.
    """
    size = H.diagonal().clamp(min=0.0).sqrt()
    size = size / size.max().clamp(min=torch.finfo(size.dtype).tiny)
    return (1 / size.clamp(min=2.0**-10)).half()


def _best_fit(M: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return L (rank, out) and A (rank, in), of equal size, of the best fit L^T A of M."""
    M = M.double()
    is_wide = M.shape[0] <= M.shape[1]
    _, Q = eigh(M @ M.T if is_wide else M.T @ M)
    Q = Q[:, -rank:].flip(1).T  # eigenvalues ascend
    L, A = (Q, Q @ M) if is_wide else (Q @ M.T, Q)
    tiny = torch.finfo(M.dtype).tiny
    balance = (A.abs().amax(1) / L.abs().amax(1).clamp(min=tiny)).clamp(min=tiny).sqrt()[:, None]
    return L * balance, A / balance


def _weight(
    state: State, shape: Shape, params: Mapping[str, Any], some: Tensor | None = None
) -> Tensor:
    """Return the sum of all blocks, or `some` rows of it, float32."""
    total = _block(state, 0, shape, params, some)
    for block in range(1, params["blocks"]):
        total = total + _block(state, block, shape, params, some)
    return total * state["input_scale"].float() if params["scaled"] else total


def _block(
    state: State, block: int, shape: Shape, params: Mapping[str, Any], some: Tensor | None = None
) -> Tensor:
    """Return one block, or `some` rows of it, (out, in) float32, of scaled inputs."""
    sizes = unpack_factor(f"{name_of(block)}_sizes", state, sum(shape), params["factors"]).float()
    rows, columns = sizes.split(shape, dim=1)
    packed = state[f"{name_of(block)}_signs"]
    if some is not None:
        rows, packed = rows[:, some], packed[some]
    # one product at a time: a row is then the same number whether it is computed alone or not
    size = rows[0][:, None] * columns[0]
    for row, column in zip(rows[1:], columns[1:], strict=True):
        size = size + row[:, None] * column
    return size * (2.0 * unpack(packed, 1, shape[1]) - 1.0)
