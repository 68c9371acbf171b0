"""PQ-index: how unevenly a vector's size is spread, and how much of it pruning has to keep.

    I_pq(w) = 1 - d^(1/q - 1/p) |w|_p / |w|_q,   0 < p < q, p <= 1

is 0 where all |w| are equal and near 1 where few hold everything (Diao et al. 2023,
arXiv:2302.05601, eq. 1). It does not change with the scale or the order of w. If the r largest
values hold all but a share eta of sum |w|^p, then r >= d (1 - I)^(pq / (q - p)) (1 + eta)^(-q /
(q - p)) (theorem 1): SAP keeps at least so many.
"""

from __future__ import annotations

from torch import Tensor

P, Q = 0.5, 1.0


def pq_index(w: Tensor, *, p: float = P, q: float = Q) -> float:
    """Return I_pq of all values of w, 0 for a vector of zeros.

    Computed in float64 on |w| / max |w|, so that no power leaves the range of floats.
    """
    _check(p, q)
    size = w.detach().double().abs().flatten()
    if not size.numel() or not (most := size.max()) > 0:
        return 0.0
    size = size / most
    # d^(-1/p) |w|_p is the p-mean: no large power of d
    means = [size.pow(k).mean().pow(1 / k) for k in (p, q)]
    return float(1 - means[0] / means[1])


def kept_share(w: Tensor, *, p: float = P, q: float = Q, eta: float = 0.0) -> float:
    """Return r / d, the least share of the values of w that SAP keeps.

    eta: what may be lost of sum |w|^p; more of it prunes more.
    """
    if eta < 0:
        raise ValueError(f"eta is a share of the norm, 0 or more; got {eta}")
    power = q / (q - p)
    return float((1 - pq_index(w, p=p, q=q)) ** (p * power) * (1 + eta) ** -power)


def _check(p: float, q: float) -> None:
    if not (0 < p <= 1 and p < q):
        raise ValueError(f"the PQ-index needs 0 < p <= 1 and p < q, got p={p}, q={q}")
