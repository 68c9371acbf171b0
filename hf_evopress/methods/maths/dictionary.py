"""Dictionary learning in the metric of a layer's inputs: W (out, in) as Z A, each row of Z sparse.

Two steps in turn, both for the least tr((W - Z A) H (W - Z A)^T). Atoms for given coefficients
are least squares that H has no part in (the method of optimal directions, Engan et al. 1999).
Coefficients for given atoms are found greedily, many at a time, and refitted in between
(generalised orthogonal matching pursuit, Wang, Kwon and Shim 2012, arXiv:1111.6664); they see the
atoms only through G = A H A^T and B = W H A^T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decompositions import cholesky
from .grid import dequantize, find_grid, quantize

ROUNDS = 6  # of the pursuit
STEPS, LAST_STEPS = 6, 16  # of conjugate gradients in a round, and in the last one
MAX_VALUES = 2**24  # of the systems that are solved at once
DAMP = 1e-5  # of normalised atoms: twins would make a system singular
FLAT = 1e-6  # curvature below which float32 knows no length of a step: the difference of twins


def learn(W: Tensor, H: Tensor, A: Tensor, n: int, sweeps: int) -> Tensor:
    """Return atoms (k, in) for rows of W (out, in) of n coefficients each, from atoms A."""
    for _ in range(sweeps):
        places, z = pursue(*seen(W, H, A), n)
        A = atoms_for(W, spread(places, z, A.shape[0]), A)
    return A


def seen(W: Tensor, H: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return B = W H A^T (out, k) and G = A H A^T (k, k), float32."""
    HA = H.double() @ A.double().T
    return (W.double() @ HA).float(), (A.double() @ HA).float()


def atoms_for(W: Tensor, Z: Tensor, A: Tensor) -> Tensor:
    """Return the best atoms for coefficients Z (out, k); those that no row uses stay as in A."""
    Z, is_used = Z.double(), Z.ne(0).any(0)
    M = Z.T @ Z
    M.diagonal().add_(1e-8 * M.diagonal().mean().clamp(min=1e-30))
    L = cholesky(M)
    best = torch.cholesky_solve(Z.T @ W.double(), L).to(A.dtype)
    return torch.where(is_used[:, None], best, A)


def pursue(B: Tensor, G: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the places (out, n) int64 of n coefficients per row, ascending, and their values.

    Minimises z G z^T - 2 b z^T for each row b of B (out, k), among z of n entries.
    """
    size = G.diagonal().clamp(min=torch.finfo(G.dtype).tiny).sqrt()
    G, B = G / (size[:, None] * size), B / size
    mask, Z, left = torch.zeros_like(B), torch.zeros_like(B), B
    targets = _targets(n)
    for before, stop in zip([0, *targets], targets, strict=False):
        new = left.abs().masked_fill(mask > 0, -1.0).topk(stop - before, dim=1).indices
        mask = mask.scatter(1, new, 1.0)
        Z = fit(B, G, mask, Z, LAST_STEPS if stop == n else STEPS)
        left = B - Z @ G
    places = mask.nonzero()[:, 1].view(len(B), n)
    return places, Z.gather(1, places) / size[places]


def fit(B: Tensor, G: Tensor, mask: Tensor, Z: Tensor, steps: int) -> Tensor:
    """Return the best coefficients (out, k) where mask is 1, for atoms of size 1, starting from Z.

    Conjugate gradients of all rows at once: products of whole matrices, where a factorisation per
    row takes ten times as long.
    """
    tiny = torch.finfo(B.dtype).tiny
    left = (B - Z @ G) * mask
    step, power = left, left.square().sum(1, keepdim=True)
    for _ in range(steps):
        applied = (step @ G) * mask
        curvature = (step * applied).sum(1, keepdim=True)
        is_known = curvature > FLAT * step.square().sum(1, keepdim=True)
        length = torch.where(is_known, power / curvature.clamp(min=tiny), 0.0)
        Z, left = Z + length * step, left - length * applied
        before, power = power, left.square().sum(1, keepdim=True)
        step = left + power / before.clamp(min=tiny) * step
    return Z


def round_values(G: Tensor, places: Tensor, z: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return symmetric codes (out, n) of values z at `places`, and scales (out,) float32.

    As GPTQ: values that are not yet rounded absorb the error of those that are. z is the best
    before rounding, so that its error is all that counts.
    """
    maxq, codes, scales = float(2**bits - 1), [], []
    size = G.diagonal().clamp(min=torch.finfo(G.dtype).tiny).sqrt()
    G = G / (size[:, None] * size)
    step = _step(places.shape[1])
    for some, own in zip(places.split(step), z.split(step), strict=True):
        R = cholesky(_systems(G, some).flip(1, 2)).flip(1, 2)
        eye = torch.eye(R.shape[1], dtype=R.dtype, device=R.device).expand_as(R)
        U = torch.linalg.solve_triangular(R, eye, upper=True)
        # in the values' own units: those of atoms of size 1 divided by the atom's size
        U = U / size[some][:, None, :]
        work, weight = own.clone(), U.diagonal(dim1=1, dim2=2) ** -2
        scale, zero = find_grid(work, maxq, symmetric=True, weight=weight)
        q = torch.empty_like(work)
        for i in range(work.shape[1]):
            q[:, i] = quantize(work[:, i], scale, zero, maxq)
            error = (work[:, i] - dequantize(q[:, i], scale, zero)) / U[:, i, i]
            work[:, i + 1 :] -= error[:, None] * U[:, i, i + 1 :]
        codes.append(q)
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def spread(places: Tensor, z: Tensor, k: int) -> Tensor:
    """Return values z (out, n) at `places` as rows of k coefficients, zero elsewhere."""
    return z.new_zeros(len(z), k).scatter(1, places, z)


def _systems(G: Tensor, places: Tensor) -> Tensor:
    """Return the Gram matrices (rows, n, n) of the atoms that each row uses, damped."""
    M = G[places[:, :, None], places[:, None, :]]
    M.diagonal(dim1=1, dim2=2).add_(DAMP)
    return M


def _step(n: int) -> int:
    return max(1, MAX_VALUES // max(1, n * n))


def _targets(n: int) -> list[int]:
    """Return how many coefficients there are after each round; the last of them is n."""
    return sorted({-(-n * i // ROUNDS) for i in range(1, ROUNDS + 1)})
