"""One scale for each row and one for each column of a weight, outside of its rotations.

W = diag(a) V diag(b). Before coding V is W over root mean squares of its rows and columns; after
it, with Z the coded V, a and b are the least squares of

    tr(G (W - diag(a) Z diag(b)) H (W - diag(a) Z diag(b))^T),

one after the other: (G o Z_b H Z_b^T) a = diag(G W H Z_b^T), Z_b = Z diag(b), and likewise for b.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWER = 1.0  # of the root mean squares
ROUNDS = 2  # of least squares, a and b one after the other
SHRINK = 1e-3  # of the mean diagonal, towards the scales before


def flatten(W: Tensor, power: float = POWER) -> tuple[Tensor, Tensor]:
    """Return a (out,) and b (in,): root mean squares of rows, and then columns, to `power`.

    Those of rows and columns of zeros are 0 and stay so: they have no error to be coded.
    """
    a = W.square().mean(1).sqrt().pow(power)
    b = (W / _unless_zero(a).unsqueeze(1)).square().mean(0).sqrt().pow(power)
    return a, b


def divided(W: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return V of W = diag(a) V diag(b), zeros where W has rows or columns of them."""
    return W / _unless_zero(a).unsqueeze(1) / _unless_zero(b)


def fit(
    W: Tensor, Z: Tensor, a: Tensor, b: Tensor, H: Tensor | None, G: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a and b, float32, of the least loss of diag(a) Z diag(b), starting from a and b.

    H (in, in), G (out, out): None for the identity.
    """
    for _ in range(ROUNDS):
        a = _one_side(W, Z * b, a, H, G)
        b = _one_side(W.T, (Z * a.unsqueeze(1)).T, b, G, H)
    return a, b


def in_half(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b in float16, of about equal size, which their products do not tell."""
    sizes = [float(x.abs().mean()) for x in (a, b)]
    ratio = (sizes[1] / sizes[0]) ** 0.5 if sizes[0] > 0 and sizes[1] > 0 else 1.0
    most = torch.finfo(torch.float16).max
    made = [x.clamp(-most, most).half() for x in (a * ratio, b / ratio)]
    return made[0], made[1]


def _one_side(W: Tensor, Z: Tensor, a: Tensor, H: Tensor | None, G: Tensor | None) -> Tensor:
    """Return the a that minimises tr(G (W - diag(a) Z) H (W - diag(a) Z)^T), shrunk."""
    Z = torch.where(a.unsqueeze(1) != 0, Z, torch.zeros_like(Z))
    weighed = Z if H is None else Z @ H
    if G is None:
        energy = (weighed * Z).sum(1)
        ridge = SHRINK * energy.mean()
        wanted = (weighed * W).sum(1) + ridge * a
        return torch.where(energy > 0, wanted / (energy + ridge).clamp_min(1e-30), a)
    A = (G * (weighed @ Z.T)).double()
    diagonal = A.diagonal()
    ridge = SHRINK * diagonal.mean()
    if not ridge > 0:
        return a
    wanted = (weighed * (G @ W)).sum(1).double() + ridge * a
    diagonal.add_(ridge)
    found: Tensor = torch.linalg.solve(A, wanted)
    return found.float()


def _unless_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))
