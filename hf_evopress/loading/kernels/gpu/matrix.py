"""A packed matrix on a GPU: products and rows by a Triton kernel of its family.

Each wraps the description that the CPU's kernels read (../matrix.py, terms.py): the packed tensors
are the same. Sizes of tiles follow from shapes; none was tuned on a machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....methods.base import Shape
from ..matrix import Matrix, Tensors
from ..steps import Steps
from .launch import launch, needs_exact

LEAST, MOST = 16, 64  # columns, and rows, of a tile; tl.dot takes no fewer


@dataclass(frozen=True)
class OnGPU(ABC):
    """A packed matrix (rows, n) on a GPU; the methods are those of Matrix."""

    matrix: Matrix
    family: ClassVar[str] = ""
    is_walked: ClassVar[bool] = False  # from left to right by one program, for rows as well

    @property
    def shape(self) -> Shape:
        return self.matrix.shape

    @property
    def is_rotated(self) -> bool:
        return self.matrix.is_rotated

    @property
    def families(self) -> frozenset[str]:
        """The kernels that this needs, by the names of their files."""
        return frozenset({self.family})

    def product(
        self,
        state: Tensors,
        x: Tensor,
        dtype: torch.dtype,
        *,
        bias: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Return x W^T + bias + start in `dtype`; x (tokens, n) contiguous, start float32."""
        y = torch.empty(len(x), self.shape[0], dtype=dtype, device=x.device)
        self.into(y, state, x, bias=bias, start=start)
        return y

    def steps(self, state: Tensors, x: Tensor, dtype: torch.dtype, **added: Any) -> Steps:
        """Return what `product` does, which has no step that others could join."""
        yield from ()
        return self.product(state, x, dtype, **added)

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
        """Write x W^T + bias + start to y (tokens, width), to the columns that `order` names."""
        (rows, n), tokens, width = self.shape, len(x), y.shape[1]
        exact = x.dtype == torch.float32 or needs_exact(x.device)
        tile = self.tile(tokens)
        grid = (-(-rows // tile["BN"]), -(-tokens // tile["BM"]))
        given = {
            **{"x": at_word(x, 8), "start": start, "bias": bias, "order": order, "y": y},
            **{"tokens": tokens, "rows": rows, "n": n, "width": width},
            **{"ONE": tokens == 1, "EXACT": exact},
        }
        launch(
            self.family,
            "product",
            grid,
            x.device,
            given | self.constants | self.tensors(state) | tile,
        )

    def weights(
        self,
        state: Tensors,
        dtype: torch.dtype,
        *,
        first: int = 0,
        last: int | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Return rows first .. last of the weight in `dtype`."""
        last = self.shape[0] if last is None else last
        return self._unpacked(state, dtype, None, first, last - first)

    def look_up(self, state: Tensors, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows (n,) int64 of the weight in `dtype`; NaN for numbers of no row."""
        return self._unpacked(state, dtype, ids.contiguous(), 0, len(ids))

    def _unpacked(
        self, state: Tensors, dtype: torch.dtype, ids: Tensor | None, first: int, count: int
    ) -> Tensor:
        device = state[self.matrix.codes].device
        y = torch.empty(count, self.shape[1], dtype=dtype, device=device)
        tile = self.tile(1)
        sizes = {"first": first, "rows": count, "all_rows": self.shape[0], "n": self.shape[1]}
        given = {"ids": ids, "y": y, "BN": tile["BN"], "BK": tile["BK"]}
        programs = 1 if self.is_walked else -(-self.across() // tile["BK"])
        grid = (-(-count // tile["BN"]), programs)
        if y.numel():
            given |= sizes | self.constants | self.tensors(state)
            launch(self.family, "unpack", grid, device, given)
        return y

    def tile(self, tokens: int) -> dict[str, int]:
        """Return the sizes of a program's tile: BM tokens, BN rows, BK columns at a time."""
        bk = self.columns_at_once()
        if tokens == 1:
            rows = self.shape[0]
            return {"BM": 1, "BN": 32 if rows >= 8192 else 16 if rows >= 4096 else 8, "BK": bk}
        if tokens <= 16:
            return {"BM": 16, "BN": 32, "BK": bk}
        return {"BM": 32 if tokens <= 32 else 64, "BN": 64, "BK": bk}

    def columns_at_once(self) -> int:
        """Return BK, a power of two from LEAST to MOST."""
        return min(MOST, max(LEAST, power_above(self.across())))

    def across(self) -> int:
        """Return how many columns, or what stands for several, a program goes through."""
        return self.shape[1]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What the kernels of this family take besides what all of them do: never changes."""
        return {}

    @abstractmethod
    def tensors(self, state: Tensors) -> dict[str, Any]:
        """Return the tensors that they read."""

    def enter(self, x: Tensor, state: Tensors) -> Tensor:
        return self.matrix.enter(x, state)

    def leave(self, y: Tensor, state: Tensors) -> Tensor:
        return self.matrix.leave(y, state)

    def enter_back(self, grad: Tensor, state: Tensors) -> Tensor:
        return self.matrix.enter_back(grad, state)

    def leave_back(self, total: Tensor, state: Tensors) -> Tensor:
        return self.matrix.leave_back(total, state)


def at_word(tensor: Tensor, n_bytes: int = 4) -> Tensor:
    """Return numbers where they can be read in words of so many bytes: most lie so."""
    return tensor if tensor.data_ptr() % n_bytes == 0 else tensor.clone()


def power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()
