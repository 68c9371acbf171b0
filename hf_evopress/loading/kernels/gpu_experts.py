"""Experts on a GPU: the matrices of all that have one level are one launch (triton_experts.py).

Nothing is asked of the GPU, so that CUDA graphs can hold it: which program has which tokens is
computed there, for as many programs as any routing needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .gpu import Codes, Floats, OnGPU
from .gpu_layer import TritonKernel, has_failed
from .launch import launch, needs_exact
from .matrix import KINDS, Tensors

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
        """Return four addresses per expert, 0 for what it has not."""
        found = []
        for e, state in enumerate(self.states):
            own = (0 if n is None or state is None else state[n].data_ptr() for n in names)
            found += [*own, self.biases[e].data_ptr() if has_bias else 0]
        return tuple(found)


def can_group(kernel: TritonKernel) -> bool:
    """Return whether all matrices of a level are of kinds that triton_experts.py knows."""
    known = all(type(m) in (Codes, Floats) for t in kernel._terms for m in t)
    return known and not kernel._has_fix and not has_failed(FAMILY)


def grouped(x: Tensor, expert: Tensor, kernel: TritonKernel, experts: Experts) -> Tensor | None:
    """Return (tokens, rows): each x times its expert's matrix; 0 where that has another level.

    x (tokens, in) contiguous, not empty; expert (tokens,) int64, sorted. None where tensors lie
    at addresses that programs do not expect.
    """
    tensors = [t for state in experts.states if state is not None for t in state.values()]
    if any(t.data_ptr() % ALIGNMENT for t in (*tensors, *experts.biases)):
        return None
    if len({b.dtype for b in experts.biases}) > 1:
        return None
    n_experts = len(experts.states)
    first = kernel._terms[0][0]
    size = 1 if len(x) <= FEW else first.tile(max(2, len(x) // n_experts))["BM"]
    tiles = Tiles(tiles_of(expert, n_experts, size), size)
    total: Tensor | None = None
    for i, matrices in enumerate(kernel._terms):
        is_last, own = i == len(kernel._terms) - 1, x
        if len(matrices) == 2:
            own = _launch(matrices[0], own, torch.float32, tiles, experts)
        dtype = x.dtype if is_last else torch.float32
        total = _launch(matrices[-1], own, dtype, tiles, experts, start=total, has_bias=is_last)
    return total


def _launch(
    matrix: OnGPU,
    x: Tensor,
    dtype: torch.dtype,
    tiles: Tiles,
    experts: Experts,
    *,
    start: Tensor | None = None,
    has_bias: bool = False,
) -> Tensor:
    (rows, n), device = matrix.shape, x.device
    y = torch.zeros(len(x), rows, dtype=dtype, device=device)
    has_bias = has_bias and len(experts.biases) > 0
    tile = matrix.tile(tiles.size) | {"BM": tiles.size}
    names, kinds = _kinds(matrix)
    given: dict[str, Any] = {
        **{"x": x, "tiles": tiles.table, "start": start, "y": y, "rows": rows, "n": n},
        "addresses": _table(experts.addresses(names, has_bias=has_bias), device),
        **{"ONE": tiles.is_one, "EXACT": x.dtype == torch.float32 or needs_exact(device)},
        "BIAS": number(experts.biases[0].dtype) if has_bias else None,
    }
    grid = (-(-rows // tile["BN"]), len(tiles.table))
    launch(FAMILY, matrix.family, grid, device, given | kinds | matrix.constants | tile)
    return y


def _kinds(matrix: OnGPU) -> tuple[tuple[str | None, ...], dict[str, Any]]:
    """Return the names of a matrix' tensors in the order of `addresses`, and what they hold."""
    m = matrix.matrix
    kind = next(dtype for dtype, i in KINDS.items() if i == m.fixed["scale_kind"])
    if isinstance(matrix, Floats):
        return (m.codes, None, None), {"VALUE": number(kind)}
    kinds = {"SCALE": number(kind), "HAS_ZEROS": m.zeros is not None}
    return (m.codes, m.scales, m.zeros), kinds


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


@lru_cache(maxsize=4096)
def _table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)
