"""The kinds of packed matrices on a GPU: which Triton kernel multiplies them, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ....base.lasting import lasting
from ....methods.maths.codebook import codebook, weyl_half, weyl_multiplier
from ....methods.maths.packing import unpack
from ....methods.maths.trellis_rounding import block_of
from .. import task as T
from ..matrix import Matrix, Tensors
from ..rotated import Rotated
from ..stacked import Stacked
from .launch import launch
from .matrix import LEAST, OnGPU, at_word, power_above
from .turns import FAMILY as TURNS
from .turns import scaled, turned

FORMULAS = ("mul1", "mcg", "3inst", "weyl")  # codebooks that are computed


class Codes(OnGPU):
    """Codes of 1 to 8 bits; eight columns, an eighth of a row apart, stand at one place."""

    family = "codes"

    def across(self) -> int:
        return -(-self.shape[1] // 8)

    def tile(self, tokens: int) -> dict[str, int]:
        """Return the sizes of a program's tile, PARTS being how often one token has BK at once."""
        sizes = super().tile(tokens)
        return sizes | {"PARTS": min(4, power_above(max(1, self.across() // sizes["BK"])))}

    def columns_at_once(self) -> int:
        return self._aligned() or super().columns_at_once()

    def _aligned(self) -> int:
        """Return the most columns at once that have one scale in each eighth, 0 for too few."""
        groups = self.matrix.fixed.get("groups", 1)
        if groups == 1:
            return super().columns_at_once()
        octets, group = self.across(), self.shape[1] // groups
        fits = (size for size in (64, 32, LEAST) if octets % size == 0 and group % size == 0)
        return next(fits, 0)

    @cached_property
    def constants(self) -> dict[str, Any]:
        bits, octets = self.matrix.fixed["bits"], self.across()
        rows, is_aligned = self.shape[0], self._aligned() > 0
        is_whole = self.shape[1] % 8 == 0 and octets % self.columns_at_once() == 0
        return {
            **_grid_sizes(self.matrix),
            **{"octets": octets, "BITS": bits, "ALIGNED": is_aligned},
            "WIDE": 1 if octets % 4 else 4,
            # the zero points of a row are in one eighth
            "WHOLE": is_aligned and is_whole and rows % 8 == 0,
        }

    def tensors(self, state: Tensors) -> dict[str, Any]:
        return {"codes": at_word(state[self.matrix.codes]), **_grids(self.matrix, state)}


class Floats(OnGPU):
    """Numbers in 16 bits: factors of a low-rank term."""

    family = "floats"

    def tensors(self, state: Tensors) -> dict[str, Any]:
        return {"values": state[self.matrix.codes]}


class Sparse(OnGPU):
    """A mask, or numbers of n:m masks, and the kept weights in 16 bits or as codes."""

    family = "sparse"
    is_walked = True

    @cached_property
    def constants(self) -> dict[str, Any]:
        m, (rows, n) = self.matrix, self.shape
        kept, group = m.fixed["kept"], 1 if m.table is None else int(m.table.shape[-1])
        has_codes = m.fixed["source"] == T.SPARSE_CODES
        grid = {"groups": 1, "zero_octets": 1, "GROUP": 1}
        return {
            **{"octets": -(-(n // group) // 8), "row_kept": kept // rows},
            **(_grid_sizes(m) if has_codes else grid),
            **{"M": group, "NUMBER_BITS": m.fixed.get("number_bits", 1)},
            **{"code_octets": -(-kept // 8), "BITS": m.fixed["bits"] if has_codes else 16},
        }

    def tensors(self, state: Tensors) -> dict[str, Any]:
        m = self.matrix
        assert m.places is not None  # terms.py gives it
        places = state[m.places]
        return {
            "places": places,
            "table": self.table_on(places.device),
            "starts": _starts(places, self.shape[0]) if m.table is None else None,
            "values": state[m.codes],
            **_grids(m, state),
        }

    def table_on(self, device: torch.device) -> Tensor | None:
        """Return the masks of n:m by number, None for any sparsity."""
        return None if self.matrix.table is None else _on(self.matrix.table, device)


class Walks(OnGPU):
    """Trellis codes: activations are rotated, and the product is rotated back."""

    family = "walks"

    @property
    def families(self) -> frozenset[str]:
        return frozenset({self.family} if self.rotated.rotation == "none" else {self.family, TURNS})

    def across(self) -> int:
        """Return how many tiles stand beside each other."""
        return int(self.matrix.fixed["width"])

    def tile(self, tokens: int) -> dict[str, int]:
        """Return the sizes of a program's tile, BK being tiles of walks."""
        sizes = super().tile(tokens)
        most = 16 if tokens == 1 else 256 // sizes["BN"]
        return sizes | {"BK": min(most, power_above(self.across()))}

    @property
    def run(self) -> int:
        """How many weights of a row are read at once: those of a walk that follow each other."""
        return 4 if self.is_mma or self.matrix.fixed["bits"] % 2 else 8

    @property
    def is_mma(self) -> bool:
        return self.matrix.fixed["source"] == T.MMA_WALKS

    @cached_property
    def constants(self) -> dict[str, Any]:
        fixed = self.matrix.fixed
        book = self.book if self.book in FORMULAS else "table"
        sizes = {"wide": fixed["width"], "PAIR": fixed["bits"], "L": fixed["number_bits"]}
        return {**sizes, **self._weyl(), "BOOK": book, "MMA": self.is_mma, "RUN": self.run}

    def _weyl(self) -> dict[str, int]:
        """Return the numbers of the codebook `weyl`."""
        if self.book != "weyl":
            return {"FACTOR": 0, "HALF": 0}
        pair, state_bits = self.matrix.fixed["bits"], self.matrix.fixed["number_bits"]
        factor = weyl_multiplier(state_bits, pair / 2) << (32 - state_bits)
        return {"FACTOR": factor % 2**32, "HALF": weyl_half(state_bits)}

    @property
    def rotated(self) -> Rotated:
        assert isinstance(self.matrix, Rotated)  # terms.py gives it
        return self.matrix

    @property
    def book(self) -> str:
        """The name of the codebook."""
        return self.rotated.codebook

    @property
    def starts(self) -> str | None:
        """The name of the walks' starts; none are of states with no more than their own bits."""
        own = self.constants["PAIR"] // 2  # bits of the first weight
        return self.rotated.starts if self.constants["L"] > own else None

    def tensors(self, state: Tensors) -> dict[str, Any]:
        codes = at_word(state[self.matrix.codes])
        starts = None if self.starts is None else state[self.starts]
        return {"codes": codes, "starts": starts, "table": self.table_on(codes.device)}

    def table_on(self, device: torch.device) -> Tensor | None:
        """Return the values of all states, None where they are computed."""
        sizes = self.constants["L"], self.constants["PAIR"] / 2
        return None if self.book in FORMULAS else _values(self.book, *sizes, device)

    def product(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        own = self.enter(x, state, torch.float32 if len(x) == 1 else x.dtype)
        y = super().product(state, own, torch.float32)
        return self.leave(y, state, dtype, start=start, bias=bias)

    def enter(self, x: Tensor, state: Tensors, dtype: torch.dtype | None = None) -> Tensor:
        """Return x (tokens, n) as the stored rows are multiplied with."""
        scales = None if self.rotated.scale else state[self.rotated.column_scales]
        return self._turned(x, 0, dtype or x.dtype, is_back=False, scales=scales)

    def leave(
        self, y: Tensor, state: Tensors, dtype: torch.dtype | None = None, **added: Tensor | None
    ) -> Tensor:
        """Return the products y (tokens, rows) of the stored rows as those of the weight.

        added: start and bias, as `turned` has them.
        """
        scales = state[self.rotated.scale or self.rotated.row_scales]
        return self._turned(y, 1, dtype or y.dtype, is_back=True, scales=scales, **added)

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        scales = state[self.rotated.scale or self.rotated.row_scales]
        return self._turned(grad, 1, grad.dtype, is_back=False, scales=scales)

    def leave_back(self, total: Tensor, state: Tensors) -> Tensor:
        scales = None if self.rotated.scale else state[self.rotated.column_scales]
        return self._turned(total, 0, total.dtype, is_back=True, scales=scales)

    def _turned(
        self, x: Tensor, side: int, dtype: torch.dtype, *, is_back: bool, **how: Any
    ) -> Tensor:
        """Return x rotated on one side: 0 inputs, 1 outputs."""
        own = self.rotated
        if own.rotation == "none":
            return scaled(x, dtype, **how)
        seed, block = 2 * own.seed + side, block_of(own.rotation)
        return turned(x, seed, block, dtype, is_back=is_back, **how)


@dataclass(frozen=True)
class RowsOfTwoKinds(OnGPU):
    """Rows that a packed mask says to be in `top`, in order, and the rest in `rest`."""

    top: OnGPU
    rest: OnGPU

    @property
    def families(self) -> frozenset[str]:
        return self.top.families | self.rest.families

    def into(
        self,
        y: Tensor,
        state: Tensors,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        n_top, own = self.top.shape[0], order_of(self.is_top(state))
        for part, some in ((self.top, own[:n_top]), (self.rest, own[n_top:])):
            part.into(y, state, x, bias=bias, start=start, order=some)

    def _unpacked(
        self, state: Tensors, dtype: torch.dtype, ids: Tensor | None, first: int, count: int
    ) -> Tensor:
        is_top = self.is_top(state)
        if ids is None:
            ids = torch.arange(first, first + count, device=is_top.device)
        known = ids.clamp(0, self.shape[0] - 1)
        before, own = is_top.long().cumsum(0)[known], is_top[known].unsqueeze(-1)
        top = self.top.look_up(state, (before - 1).clamp(min=0), dtype)
        rest = self.rest.look_up(state, (known - before).clamp(max=self.rest.shape[0] - 1), dtype)
        rows = torch.where(own, top, rest)
        return rows.masked_fill_((ids != known).unsqueeze(-1), torch.nan)

    def is_top(self, state: Tensors) -> Tensor:
        """Return (rows,) bool."""
        return unpack(state[self.matrix.codes], 1, self.shape[0]).bool()

    def tensors(self, state: Tensors) -> dict[str, Any]:
        return {}


def on_gpu(matrix: Matrix) -> OnGPU:
    """Return the matrix as kernels in Triton read it."""
    if isinstance(matrix, Stacked):
        assert matrix.top is not None and matrix.rest is not None  # terms.py gives both
        return RowsOfTwoKinds(matrix, on_gpu(matrix.top), on_gpu(matrix.rest))
    kinds: dict[int, type[OnGPU]] = {
        T.CODED: Codes,
        T.SPARSE_CODES: Sparse,
        T.SPARSE_FLOATS: Sparse,
        T.FLOATS: Floats,
        T.WALKS: Walks,
        T.MMA_WALKS: Walks,
    }
    return kinds[matrix.fixed.get("source", T.CODED)](matrix)


def order_of(is_top: Tensor) -> Tensor:
    """Return which output each stored row is, int32: the top rows, then the rest.

    is_top (..., rows) bool.
    """
    # a stable sort: kinds keep their order
    return is_top.logical_not().to(torch.uint8).argsort(stable=True, dim=-1).int()


def _grids(m: Matrix, state: Tensors) -> dict[str, Any]:
    """Return scales and zero points, None where there are none."""
    return {
        "scales": None if m.scales is None else state[m.scales],
        "zeros": None if m.zeros is None else state[m.zeros],
    }


def _grid_sizes(m: Matrix) -> dict[str, Any]:
    (rows, n), groups = m.shape, m.fixed.get("groups", 1)
    return {"groups": groups, "zero_octets": -(-rows * groups // 8), "GROUP": n // groups}


def _starts(mask: Tensor, rows: int) -> Tensor:
    """Return before which kept weight each row of a packed mask begins, int32."""
    counts = torch.empty(rows, dtype=torch.int32, device=mask.device)
    sizes = {"rows": rows, "width": mask.shape[1], "BN": 16, "BK": 64}
    launch(
        "sparse",
        "count",
        (-(-rows // 16),),
        mask.device,
        {"places": mask, "counts": counts} | sizes,
    )
    return torch.cumsum(counts, 0, dtype=torch.int32) - counts


@lru_cache(maxsize=None)
@lasting
def _on(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device)


@lru_cache(maxsize=None)
@lasting
def _values(name: str, state_bits: int, bits: float, device: torch.device) -> Tensor:
    """Return a codebook's values in the half precision that they have."""
    return codebook(name, state_bits, bits).half().to(device)
