"""Error feedback inside ggml's types: GPTQ over their blocks, at the same bytes.

Block by block ggml chooses the scales, from weights that carry every error so far and with the
importance 1 / U_ii^2 that GPTQ's loss gives each input. Then codes are rounded input by input, each
error absorbed by the inputs that follow, in this block and after it (Frantar et al. 2022,
arXiv:2210.17323). Lattice codes stay those that ggml chose with the scales: their errors are
absorbed by later blocks and, inside the block, by nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..obs import MAX_VALUES, solve
from . import lattice
from .encoder import encode
from .scalar import LAYOUTS
from .types import Kind


def round_rows(kind: Kind, W: Tensor, U: Tensor) -> Tensor:
    """Return the bytes (n, row bytes) uint8 of the rows of W (n, in), rounded with feedback.

    U: upper, from `Stats.inverse_factor`.
    """
    made = []
    for part in W.split(max(1, MAX_VALUES // W.shape[1])):
        work = part.T.to(U.device).float().contiguous().clone()
        rule = BlockRounding(kind, work, U)
        solve(work, U, rule, kind.block)
        made.append(rule.bytes())
    return torch.cat(made)


class BlockRounding:
    """The rule of `solve` that rounds weights to the blocks of a type."""

    def __init__(self, kind: Kind, W: Tensor, U: Tensor) -> None:
        self.kind, self.layout = kind, LAYOUTS.get(kind.name)
        self._importance = U.diagonal() ** -2
        self._codes = torch.empty(kind.block, W.shape[1], dtype=torch.uint8, device=W.device)
        self._blocks: list[Tensor] = []
        if self.layout is not None:
            self._values = self.layout.table(W.device)
            self._edges = (self._values[1:] + self._values[:-1]) / 2

    def __call__(self, W: Tensor, i: int) -> Tensor:
        place = i % self.kind.block
        if place == 0:
            self._begin(W[i : i + self.kind.block], i)
        if self.layout is None:
            return self._fixed[place]
        return self._round(W[i], place)

    def bytes(self) -> Tensor:
        """Return the bytes of all rows, (n, row bytes) uint8."""
        return torch.cat(self._blocks, dim=1)

    def _begin(self, block: Tensor, i: int) -> None:
        """Have ggml choose the scales of a block (block, n), and the codes of a lattice."""
        importance = self._importance[i : i + len(block)]
        raw = encode(self.kind, block.T, importance).to(block.device)
        self._blocks.append(raw)
        if self.layout is None:
            self._fixed = lattice.decode(self.kind.name, raw).T.contiguous()
            return
        scale, offset = self.layout.scales(raw)
        self._scale = scale.T.contiguous()
        self._offset = None if offset is None else offset.T.contiguous()

    def _round(self, w: Tensor, place: int) -> Tensor:
        """Return the weights w (n,) of one input of the block as they are stored."""
        layout = self.layout
        assert layout is not None  # for mypy: the caller looked
        sub = place // layout.sub
        scale, offset = self._scale[sub], None if self._offset is None else self._offset[sub]
        x = w if offset is None else w - offset
        x = torch.where(scale == 0, 0.0, x / scale)
        if layout.values is None:
            code = (x + layout.zero).round_().clamp_(0, layout.top)
            value = code - layout.zero
        else:
            code = torch.bucketize(x, self._edges)
            value = self._values[code]
        self._codes[place] = code.to(torch.uint8)
        if place == self.kind.block - 1:
            self._blocks[-1] = layout.with_codes(self._blocks[-1], self._codes.T)
        value = scale * value
        return value if offset is None else value + offset
