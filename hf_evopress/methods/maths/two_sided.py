"""Round a weight tile by tile, so that later tiles absorb the errors of earlier ones on two sides.

The loss of an error dW is tr(G dW H dW^T), with H the second moment of a layer's inputs and G
that of the gradients at its outputs (`Stats`). With H = M D M^T and G = N E N^T, D and E
block-diagonal, M lower and N upper triangular with identities in their diagonal blocks, it is
|E^1/2 (N^T dW M) D^1/2|^2. So a tile (r, c) is rounded towards

    T_rc + sum_{c' > c} (T_rc' - Y_rc') M_c'c,    T_rc = W_rc + sum_{r' < r} (N^T)_rr' dW_r'c:

rows of tiles from top to bottom, columns of tiles from right to left (YAQA, Tseng, Sun and De Sa
2025, arXiv:2505.22988; without G this is LDLQ, or GPTQ in blocks). A tile waits for those above
it in its column and those right of it in its row: the tiles of an antidiagonal are independent
and are rounded together, and so are those of all weights that are rounded in step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .decompositions import cholesky_or_none

TILE = 16  # rows and columns of a tile
# G of some thousand tokens is noisy: with 0.1 of its mean diagonal nothing is gained by it.
DAMP_OUTPUTS = 0.5

Rounder = Callable[[list[Tensor]], list[Tensor]]  # tiles (n, 16, 16) of each weight -> rounded


def block_factor(H: Tensor, damp: float, *, upper: bool = False, block: int = TILE) -> Tensor:
    """Return M of H + damp * mean(diag H) * I = M D M^T, (n, n) float32, n padded to blocks.

    M is lower (or upper) triangular with identities as its diagonal blocks of `block`. Computed
    in float64; a matrix of few tokens is singular and is damped more until it is not.
    """
    n = H.shape[0]
    H = H.double()
    mean = H.diagonal().clamp(min=0).mean()
    mean = mean if mean > 0 else H.new_tensor(1.0)
    for factor in (1.0, 10.0, 100.0):
        damped = H.clone()
        damped.diagonal().add_(max(damp, 1e-6) * factor * mean)
        if (C := cholesky_or_none(damped.flip(0, 1) if upper else damped)) is not None:
            break
    else:
        raise ValueError(
            "a second moment of a layer's inputs or output gradients is not positive definite; "
            "it probably contains inf or NaN: check the model and its dtype"
        )
    C = C.flip(0, 1) if upper else C
    size = n + -n % block
    M = torch.eye(size, dtype=C.dtype, device=C.device)
    for start in range(0, n, block):
        own = slice(start, min(start + block, n))
        # C = M D^1/2: the columns of a block times the inverse of its diagonal block
        M[:n, own] = torch.linalg.solve(C[own, own], C[:, own], left=False)
    return M.float()


class Weight:
    """A weight that is being rounded: its tiles' targets, and what was lost on the way."""

    def __init__(self, W: Tensor, M: Tensor, N: Tensor | None) -> None:
        """W (out, in), M and N as from `block_factor` (N upper, or None for one side)."""
        rows, columns = W.shape
        pad = (0, -columns % TILE, 0, -rows % TILE)
        self.W = torch.nn.functional.pad(W, pad)
        self.M = M.view(M.shape[0], -1, TILE).transpose(0, 1).contiguous()  # (tiles, in, 16)
        self.N = None if N is None else N.T.contiguous().view(-1, TILE, N.shape[0])
        self.rows, self.columns = (size // TILE for size in self.W.shape)
        self._targets = torch.empty_like(self.W)  # T; T - Y where a tile is rounded
        self._errors = torch.zeros_like(self.W)
        # dW with the rows of a column of tiles together: (tiles, out, 16)
        self._lost = None if N is None else self.W.new_zeros(self.columns, len(self.W), TILE)

    @property
    def steps(self) -> int:
        """The number of steps to the last tile."""
        return self.columns if self.N is None else self.rows + self.columns - 1

    def targets(self, step: int) -> Tensor:
        """Return what the tiles of this step are rounded towards, (n, 16, 16)."""
        if self.N is None:
            c = self.columns - 1 - step
            T = self.W[:, c * TILE : (c + 1) * TILE]
            right = slice((c + 1) * TILE, None)
            T = T + self._errors[:, right] @ self.M[c, right]
            return T.view(self.rows, TILE, TILE)
        low, high, c = self._on_diagonal(step)
        assert self._lost is not None
        T = self._diagonal(self.W, step).clone()
        above = slice(0, high * TILE)  # nothing is lost yet further down
        T += self.N[low:high, :, above] @ self._lost[c : c + high - low, above]
        self._diagonal(self._targets, step).copy_(T)
        right = slice((c + 1) * TILE, None)  # left of it there are no errors yet
        E = self._errors.view(self.rows, TILE, -1)[low:high, :, right]
        return T + E @ self.M[c : c + high - low, right]

    def accept(self, step: int, Y: Tensor) -> None:
        """Take note of what the tiles of this step were rounded to."""
        if self.N is None:
            c = self.columns - 1 - step
            tiles = slice(c * TILE, (c + 1) * TILE)
            self._errors[:, tiles] = self.W[:, tiles] - Y.reshape(-1, TILE)
            return
        assert self._lost is not None
        errors = self._diagonal(self._errors, step)
        errors.copy_(self._diagonal(self._targets, step) - Y)
        lost = self._lost.view(self.columns, self.rows, TILE, TILE)
        lost = lost.diagonal(self._offset(step), dim1=1, dim2=0).permute(2, 0, 1)
        lost.copy_(self._diagonal(self.W, step) - Y)

    def places(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the row and the column of the tiles of this step, (n,) int64 each."""
        if self.N is None:
            r = torch.arange(self.rows)
            return r, torch.full_like(r, self.columns - 1 - step)
        low, high, c = self._on_diagonal(step)
        return torch.arange(low, high), torch.arange(c, c + high - low)

    def _offset(self, step: int) -> int:
        return self.columns - 1 - step  # column - row of the step's tiles

    def _on_diagonal(self, step: int) -> tuple[int, int, int]:
        """Return the rows low .. high of the step's tiles, and the column of the first."""
        low = max(0, -self._offset(step))
        high = min(self.rows, step + 1)
        return low, high, low + self._offset(step)

    def _diagonal(self, X: Tensor, step: int) -> Tensor:
        """Return a view (n, 16, 16) of the step's tiles of X."""
        tiles = X.view(self.rows, TILE, self.columns, TILE)
        return tiles.diagonal(self._offset(step), dim1=0, dim2=2).permute(2, 0, 1)


def round_in_step(weights: Sequence[Weight], rounder: Rounder) -> None:
    """Round weights to the end, all tiles of a step in one call of `rounder`.

    rounder(step's targets, one (n, 16, 16) per weight, n = 0 for those that are finished)
    returns what they are rounded to.
    """
    for step in range(max(weight.steps for weight in weights)):
        targets = [
            weight.targets(step) if step < weight.steps else weight.W.new_empty(0, TILE, TILE)
            for weight in weights
        ]
        for weight, Y in zip(weights, rounder(targets), strict=True):
            if step < weight.steps:
                weight.accept(step, Y)
