"""Experts on a GPU: the matrices of all that have one level are one launch (triton_experts.py).

Rows at two bit-widths are two launches, a sum of levels one for each matrix; sparse weights have
one more that counts what is kept, and trellis codes two that rotate all tokens. Nothing
is asked of the GPU, so that CUDA graphs can hold it: which program has which tokens is computed
there, for as many programs as any routing needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ....base.lasting import lasting
from ....methods.maths.packing import unpack
from ..matrix import KINDS, Tensors
from .kinds import Floats, RowsOfTwoKinds, Sparse, Walks, order_of
from .launch import launch, needs_exact
from .layer import TritonKernel, has_failed
from .matrix import OnGPU, at_word

FAMILY = "experts"
FEW = 16  # tokens, up to which a program has one of them
ALIGNMENT = 16  # bytes, which programs expect of addresses


@dataclass(frozen=True)
class Tiles:
    """Which expert and tokens each program has (n, 3) int32, and how many tokens at most."""

    table: Tensor
    size: int

    @property
    def is_one(self) -> bool:
        return self.size == 1


@dataclass(frozen=True)
class Experts:
    """Packed tensors of each expert, None for those of another level, and the biases of all."""

    states: Sequence[Tensors | None]
    biases: Sequence[Tensor]

    @property
    def some(self) -> Tensors:
        return next(state for state in self.states if state is not None)

    def addresses(self, names: Sequence[str | None], *, has_bias: bool) -> tuple[int, ...]:
        """Return five addresses per expert, 0 for what it has not.

        names: of codes, scales, zero points and places, None for what there is not.
        """
        found = []
        for e, state in enumerate(self.states):
            own = [0 if n is None or state is None else state[n].data_ptr() for n in names]
            found += [*own[:3], self.biases[e].data_ptr() if has_bias else 0, own[3]]
        return tuple(found)


def can_group(kernel: TritonKernel) -> bool:
    """Return whether triton_experts.py has what a level needs."""
    return not kernel._has_fix and not has_failed(FAMILY)


def grouped(x: Tensor, expert: Tensor, kernel: TritonKernel, experts: Experts) -> Tensor | None:
    """Return (tokens, rows): each x times its expert's matrix; 0 where that has another level.

    x (tokens, in) contiguous, not empty; expert (tokens,) int64, sorted. None where tensors have
    no address, or not one that programs expect.
    """
    tensors = [t for state in experts.states if state is not None for t in state.values()]
    if any(not t.numel() or t.data_ptr() % ALIGNMENT for t in (*tensors, *experts.biases)):
        return None
    if len({b.dtype for b in experts.biases}) > 1:
        return None
    n_experts = len(experts.states)
    first = kernel._terms[0][0]
    size = 1 if len(x) <= FEW else first.tile(max(2, len(x) // n_experts))["BM"]
    tiles = Tiles(tiles_of(expert, n_experts, size), size)
    call = Call(expert, tiles, experts)
    total: Tensor | None = None
    for i, matrices in enumerate(kernel._terms):
        is_last, own = i == len(kernel._terms) - 1, x
        if len(matrices) == 2:
            own = call.product(matrices[0], own, torch.float32)
        dtype = x.dtype if is_last else torch.float32
        total = call.product(matrices[-1], own, dtype, start=total, has_bias=is_last)
    return total


@dataclass(frozen=True)
class Call:
    """Products of the same tokens with matrices of their experts."""

    expert: Tensor
    tiles: Tiles
    experts: Experts

    def product(
        self,
        matrix: OnGPU,
        x: Tensor,
        dtype: torch.dtype,
        *,
        start: Tensor | None = None,
        has_bias: bool = False,
    ) -> Tensor:
        """Return (tokens, rows) in `dtype`; 0 for tokens whose expert has another level."""
        y = torch.zeros(len(x), matrix.shape[0], dtype=dtype, device=x.device)
        has_bias = has_bias and len(self.experts.biases) > 0
        if isinstance(matrix, Walks):
            y = self._rotated(matrix, x, y, start, has_bias)
        elif isinstance(matrix, RowsOfTwoKinds):
            n_top, order = matrix.top.shape[0], order_of(self._is_top(matrix))
            kinds = (matrix.top, order[:, :n_top]), (matrix.rest, order[:, n_top:])
            for part, some in kinds:
                self._into(y, part, x, start=start, has_bias=has_bias, order=some.contiguous())
        else:
            self._into(y, matrix, x, start=start, has_bias=has_bias)
        return y

    def _into(
        self,
        y: Tensor,
        matrix: OnGPU,
        x: Tensor,
        *,
        start: Tensor | None = None,
        has_bias: bool = False,
        order: Tensor | None = None,
    ) -> None:
        (rows, n), device, size = matrix.shape, x.device, self.tiles.size
        tile = matrix.tile(size) | {"BM": size}
        names, kinds = tensors_of(matrix)
        addresses = self.experts.addresses(names, has_bias=has_bias)
        given: dict[str, Any] = {
            **{
                "x": at_word(x, 8),
                "tiles": self.tiles.table,
                "start": start,
                "order": order,
                "y": y,
            },
            **{"rows": rows, "n": n, "width": y.shape[1]},
            "addresses": _table(addresses, device),
            **{"ONE": self.tiles.is_one, "EXACT": x.dtype == torch.float32 or needs_exact(device)},
            "BIAS": number(self.experts.biases[0].dtype) if has_bias else None,
        }
        if isinstance(matrix, Sparse):
            given["starts"] = self._starts(matrix, given["addresses"])
        grid = (-(-rows // tile["BN"]), len(self.tiles.table))
        more = kinds | tables_of(matrix, device) | matrix.constants
        launch(FAMILY, matrix.family, grid, device, given | more | tile)

    def _rotated(
        self, matrix: Walks, x: Tensor, y: Tensor, start: Tensor | None, has_bias: bool
    ) -> Tensor:
        m = matrix.rotated
        names = (m.scale,) if m.scale is not None else (m.row_scales, m.column_scales)
        states, own = self.experts.states, dict[str, Tensor]()  # of each token
        for name in names:
            own[name] = self._of_tokens([None if s is None else s[name] for s in states])
        turned = matrix.enter(x, own, torch.float32 if self.tiles.is_one else x.dtype)
        found, bias = torch.zeros_like(y, dtype=torch.float32), None
        self._into(found, matrix, turned)
        if has_bias:
            known = zip(states, self.experts.biases, strict=True)
            bias = self._of_tokens([None if s is None else b for s, b in known])
        return matrix.leave(found, own, y.dtype, start=start, bias=bias)

    def _of_tokens(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return (tokens, n): each token's row of its expert's (n,), 0 where that has none."""
        some = next(t for t in tensors if t is not None)
        nothing = torch.zeros_like(some)
        rows = torch.stack([nothing if t is None else t for t in (*tensors, None)])
        return rows[self.expert.clamp(max=len(tensors))]

    def _is_top(self, matrix: RowsOfTwoKinds) -> Tensor:
        """Return (experts, rows) bool; of any for experts of another level."""
        name, some = matrix.matrix.codes, self.experts.some
        masks = [(some if state is None else state)[name] for state in self.experts.states]
        return unpack(torch.stack(masks), 1, matrix.shape[0]).bool()

    def _starts(self, matrix: Sparse, addresses: Tensor) -> Tensor | None:
        """Return (experts, rows) int32: before which kept weight each row of a mask begins."""
        m, rows, n_experts = matrix.matrix, matrix.shape[0], len(self.experts.states)
        if m.table is not None:
            return None
        counts = torch.zeros(n_experts, rows, dtype=torch.int32, device=addresses.device)
        given = {"addresses": addresses, "counts": counts, "rows": rows}
        given |= {"width": m.fixed["places_width"], "BN": 16, "BK": 64}
        launch(FAMILY, "count", (-(-rows // 16), n_experts), addresses.device, given)
        return torch.cumsum(counts, 1, dtype=torch.int32) - counts


def tensors_of(matrix: OnGPU) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """Return the names of a matrix' tensors in the order of `addresses`, and what they hold."""
    m, byte = matrix.matrix, number(torch.uint8)
    if isinstance(matrix, Walks):
        starts = matrix.starts
        return (m.codes, None, None, starts), {"START": None if starts is None else byte}
    kind = number(next(dtype for dtype, i in KINDS.items() if i == m.fixed["scale_kind"]))
    grid = {"SCALE": m.scales and kind, "ZERO": m.zeros and byte}
    names = (m.codes, m.scales, m.zeros, m.places)
    if isinstance(matrix, Floats):
        return names, {"VALUE": kind}
    return names, grid if m.places is None else grid | {"VALUE": byte if m.scales else kind}


def tables_of(matrix: OnGPU, device: torch.device) -> dict[str, Any]:
    """Return the table that the matrices of all experts share, where their kernel takes one."""
    if isinstance(matrix, Walks | Sparse):
        return {"table": matrix.table_on(device)}
    return {}


def tiles_of(expert: Tensor, n_experts: int, size: int) -> Tensor:
    """Return (programs, 3) int32: expert, or -1 for none, and its tokens from a first to an end.

    expert (tokens,) int64, sorted; numbers of n_experts and more are those of no expert.
    """
    tokens, device = len(expert), expert.device
    if size == 1:
        token = torch.arange(tokens, device=device)
        own = torch.where(expert < n_experts, expert, -1)
        return torch.stack([own, token, token + 1], 1).int()
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, expert.clamp(max=n_experts), torch.ones_like(expert))
    counts = counts[:n_experts]
    first, needed = counts.cumsum(0) - counts, (counts + size - 1) // size
    ends = needed.cumsum(0)
    number = torch.arange(tokens // size + min(n_experts, tokens), device=device)
    of = torch.searchsorted(ends, number, right=True)
    known = of.clamp(max=n_experts - 1)
    start = first[known] + (number - ends[known] + needed[known]) * size
    own = torch.where(of < n_experts, of, -1)
    return torch.stack([own, start, (first + counts)[known]], 1).int()


def number(dtype: torch.dtype) -> Any:
    """Return what Triton calls a dtype."""
    return getattr(import_module("triton.language"), str(dtype).removeprefix("torch."))


@lru_cache(maxsize=None)  # a CUDA graph reads them where they were
@lasting
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)
