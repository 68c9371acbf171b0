"""Layers of a graph for ONNX Runtime, made of levels: how the terms of each are stored and run.

codes      one or two operators of ONNX Runtime of 4 bits (codes.py). Sparse codes too, without what
           their zeros save.
rows       two such weights, and the place of each row among both.
low rank   two thin products; float factors in their 16 bits.
the rest   a dense weight in the dtype of the model, as the dense export writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...methods import compose
from ...methods.base import Shape, State
from ...methods.lowrank import factors_of
from ...methods.maths.codes import SCALE_DTYPES, CodedMethod, n_groups, unpack_grid
from ...methods.maths.packing import unpack
from ...methods.maths.sparse import FLOAT_BITS, SparseMethod
from ...methods.rows import parts_of
from ...plans.level import Level
from .codes import Codes, block_of


class Factors(nn.Module):
    """A low-rank weight B A."""

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A.contiguous())
        self.register_buffer("B", B.contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A.float()), self.B.float())

    def look_up(self, rows: Tensor) -> Tensor:
        return self.B[rows].float() @ self.A.float()


class Dense(nn.Module):
    """A weight as it is; 16 bits are made 32 by the graph, which ONNX Runtime does once."""

    W: Tensor

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.register_buffer("W", W.detach().contiguous())

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W.float())

    def look_up(self, rows: Tensor) -> Tensor:
        return self.W[rows].float()


class TwoKinds(nn.Module):
    """Rows of two bit-widths, those of the first kind before those of the second."""

    top: Codes
    rest: Codes
    place: Tensor

    def __init__(self, top: Codes, rest: Codes, is_top: Tensor) -> None:
        super().__init__()
        self.top, self.rest = top, rest
        order = torch.argsort(is_top.byte(), descending=True, stable=True)
        self.register_buffer("place", torch.argsort(order).to(torch.int32))

    def matmul(self, x: Tensor) -> Tensor:
        both = torch.cat([self.top.matmul(x), self.rest.matmul(x)], -1)
        return both.index_select(-1, self.place.long())

    def look_up(self, rows: Tensor) -> Tensor:
        place, n = self.place[rows].long(), self.top.rows
        top = self.top.look_up(place.clamp(max=n - 1))
        rest = self.rest.look_up((place - n).clamp(min=0))
        return torch.where((place < n).unsqueeze(-1), top, rest)


Part = Codes | Factors | Dense | TwoKinds


class Layer(nn.Module):
    """x (..., in) -> (..., out): the sum of the products of its parts, and a bias."""

    def __init__(self, parts: list[Part], rows: int, bias: Tensor | None) -> None:
        super().__init__()
        self.parts, self.rows = nn.ModuleList(parts), rows
        self.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        found = [part.matmul(x) for part in self.parts]  # type: ignore[operator]
        if not found:
            found = [x.new_zeros(*x.shape[:-1], self.rows)]
        total: Tensor = sum(found[1:], start=found[0])
        return total if self.bias is None else total + self.bias


class Embedding(nn.Module):
    """Token ids (...) -> rows (..., dim), and what the embedding of the model does to them."""

    def __init__(self, parts: list[Part], shape: Shape) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.num_embeddings, self.embedding_dim = shape
        self.does: Callable[..., Tensor] = self.rows_of

    def rows_of(self, ids: Tensor) -> Tensor:
        found = [part.look_up(ids) for part in self.parts]  # type: ignore[operator]
        if not found:
            return torch.zeros(*ids.shape, self.embedding_dim)
        return sum(found[1:], start=found[0])

    def forward(self, ids: Tensor) -> Tensor:
        return self.does(ids)


def is_packed(level: Level, shape: Shape) -> bool:
    """Return whether all terms of a level have a place in the graph; if not, it is dense there."""
    for method, params, _ in compose.parts(compose.normalize(level)):
        if method.name in ("zero", "lowrank"):
            continue
        has_codes = method.name == "rows" or isinstance(method, CodedMethod)
        if isinstance(method, SparseMethod):
            has_codes = params["bits"] != FLOAT_BITS
        if not has_codes or block_of(shape[1] // n_groups(shape, params["group_size"])) is None:
            return False
    return True


def parts_of_level(level: Level, state: State, shape: Shape, dtype: torch.dtype) -> list[Part]:
    """Return how a weight at `level` is stored and run; one dense part where it must be dense."""
    level = compose.normalize(level)
    if not is_packed(level, shape):
        return [Dense(compose.decompress(level, state, shape, dtype))]
    return list(_parts(level, state, shape))


def _parts(level: Level, state: State, shape: Shape) -> Iterator[Part]:
    """Yield the part of each term of a level, of zero none."""
    terms = compose.terms(level, state)
    for term, (method, params, tensors, _) in zip(level.terms, terms, strict=True):
        if method.name == "rows":
            yield _two_kinds(tensors, shape, params)
        elif method.name == "lowrank":
            yield Factors(*factors_of(term, tensors, shape))
        elif method.name != "zero":
            grid = method.codes(tensors, shape, **params)
            assert grid is not None  # is_packed has seen that there are codes
            yield Codes(*grid, SCALE_DTYPES[params["scales"]])


def _two_kinds(state: State, shape: Shape, params: dict[str, Any]) -> TwoKinds:
    made = []
    for prefix, part, own in parts_of(shape, params):
        mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        q = unpack(mine["codes"], own["bits"], part[1])
        made.append(Codes(q, *unpack_grid(mine, part, **own), SCALE_DTYPES[own["scales"]]))
    top, rest = made
    return TwoKinds(top, rest, unpack(state["top_mask"], 1, shape[0]).bool())
