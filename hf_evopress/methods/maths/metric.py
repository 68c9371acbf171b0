"""In which metric an error of a weight is small: that of its layer's inputs, or its own."""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import eigh, qr
from .linalg import Stats

METRICS = ("whitened", "diag", "plain")


class Metric:
    """The inner product on a layer's inputs in which an error is small or large.

    whitened: E |dW x|^2, diag: only the variances of x, plain: |dW|^2; centred subtracts the
    mean of x, which a bias can carry. Everything is float64: squared spectra need it.
    """

    def __init__(
        self,
        stats: Stats | None,
        *,
        metric: str = "whitened",
        centred: bool = False,
        sink: float = 0.05,
    ) -> None:
        self.mean: Tensor | None = None
        self.H: Tensor | None = None
        self._root: Tensor | None = None
        if stats is None:
            return
        if centred:
            if stats.mean is None:
                raise ValueError(
                    "centred=true needs the mean of the layer's inputs, which these "
                    "statistics do not hold; calibrate again, or leave centred out"
                )
            self.mean = stats.mean.double()
        if metric != "plain":
            self.H = stats.hessian(sink=sink).double()
            if self.mean is not None:
                self.H = self.H - torch.outer(self.mean, self.mean)
            if metric == "diag":
                self.H = self.H.diagonal().clamp(min=0.0).diag()

    @property
    def root(self) -> Tensor | None:
        """S (in, in) with S S^T = H; H need not have full rank."""
        if self._root is None and self.H is not None:
            values, Q = eigh(self.H)
            self._root = Q * values.clamp(min=0.0).sqrt()
        return self._root

    def basis(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues (n,) of W H W^T, largest first, and U (out, n); n = min(out, in).

        What rank r leaves of tr(W H W^T) is values[r:].sum().
        """
        W = W.double()
        if W.shape[0] <= W.shape[1]:
            values, U = eigh(W @ W.T if self.H is None else W @ self.H @ W.T)
            return values.flip(0).clamp(min=0.0), U.flip(1)
        M = W if self.root is None else W @ self.root
        values, V = eigh(M.T @ M)
        # M v_i are the eigenvectors of M M^T, but tiny ones are all noise: QR keeps the first
        # r columns spanning the same space for every r, and orthonormal to the last digit.
        U, _ = qr(M @ V.flip(1))
        return values.flip(0).clamp(min=0.0), U
