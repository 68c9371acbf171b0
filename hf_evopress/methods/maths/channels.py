"""Which inputs a weight can spare, and the least-squares fit of what stays to the outputs of all.

Leaving out column c of W and refitting the others costs |W[:, c]|^2 / (H^-1)[c, c] (optimal brain
surgeon, Hassibi & Stork 1993, for whole columns as in ZipLM, Kurtic et al. 2023,
arXiv:2302.04089). Columns go in rounds, the cheapest of each first; after a round what is left is
refitted and H^-1 is that of the columns left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import DAMP

ROUNDS = 32


def fewer_columns(W: Tensor, H: Tensor, keep: int, *, damp: float = DAMP) -> tuple[Tensor, Tensor]:
    """Return which columns of W (out, in) stay, (keep,) ascending, and their values (out, keep).

    H (in, in): second moment of the inputs; damp: what is added to its diagonal, in its mean. The
    values minimise tr((W - W') H (W - W')^T).
    """
    n = W.shape[1]
    if not 0 < keep <= n:
        raise ValueError(f"a weight of {n} inputs keeps 1 to {n} of them, got {keep}")
    H = H.double()
    mean = H.diagonal().mean()
    H = H + damp * (mean if mean > 0 else 1.0) * torch.eye(n, dtype=H.dtype, device=H.device)
    left, values, inverse = torch.arange(n, device=W.device), W.double(), torch.linalg.inv(H)
    while len(left) > keep:
        cost = values.square().sum(0) / inverse.diagonal()
        n_out = min(len(left) - keep, -(-(n - keep) // ROUNDS))
        out = cost.topk(n_out, largest=False).indices
        stays = torch.ones(len(left), dtype=torch.bool, device=W.device)
        stays[out] = False
        share = torch.linalg.solve(inverse[out][:, out], inverse[out][:, stays])
        values = values[:, stays] - values[:, out] @ share
        inverse = inverse[stays][:, stays] - inverse[stays][:, out] @ share
        left = left[stays]
    fitted = torch.linalg.solve(H[left][:, left], H[left] @ W.double().T).T
    return left, fitted.to(W.dtype)
