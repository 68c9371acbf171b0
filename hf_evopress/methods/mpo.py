"""Experimental: a weight as a sum of Kronecker products, a matrix product operator of two sites.

CompactifAI (Tomut et al. 2024, arXiv:2401.14109). With out = r1 r2 and in = c1 c2, W = sum over
i of P_i (x) Q_i, P_i (r1, c1) and Q_i (r2, c2). The best such sum is a truncated singular value
decomposition of W with its sides in the order (r1 c1), (r2 c2) (Van Loan and Pitsianis 1993). It is
best for the layer's output where H is a Kronecker product as well: `metric=kron` puts the nearest
one, H1 (x) H2, in the place of H. Inputs of transformers have no such order: on block 15 of
SmolLM2-135M its error on held-out text was a quarter to a half larger than that of the plain
metric, the default (tests/benchmarks/README.md).

`bits` are bits per weight: as many terms as fit. Stores both factors (terms, r c), with a scale per
term where they are coded. Runs as the weight that they make up.

When to use it: for experiments, and for weights that are Kronecker products by design. As it is
made its KL is six to 26 times that of `gptq` at the same bytes, and up to twice that of `lowrank`.
Nor is it a better start for training: an SVD of as many bytes, healed alike, loses less. SmolLM2 at
8 bits, factors and norms trained for 32 steps: 6.75 nats, the SVD 2.75, and 4.38 before any healing
(tests/benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, Param, Shape, State
from .maths.decompositions import cholesky, least_squares, svd
from .maths.factors import FLOATS, KINDS, empty_factor, factor_bits, pack_factor, unpack_factor
from .maths.linalg import SINK, Stats

METRICS = ("plain", "kron")
_ITERATIONS = 20  # of the power method for H1 and H2; 5 already agree to 1e-3
_DAMP = 1e-3  # of the mean diagonal: H1 and H2 are inverted


class MPO(Method):
    """`mpo:bits=4`: Kronecker products of 4-bit factors, 4 bits per weight in all."""

    name = "mpo"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "bits": Param(float, "bits per weight, at most", at_least=0.01, at_most=32.0),
        "factors": Param(str, "how factors are stored", default="int4", choices=KINDS),
        "metric": Param(
            str,
            "what error counts: on the inputs, or on the weight",
            default="plain",
            choices=METRICS,
        ),
        "sink": Param(float, "weight of position 0 in the metric", default=SINK, at_least=0.0),
    }
    examples = (
        "mpo:bits=4",
        "mpo:bits=8,factors=bfloat16,metric=kron",
        "mpo:bits=3,factors=int8,metric=kron,sink=0.0",
    )

    def uses_stats(self, **params: Any) -> bool:
        return params["metric"] == "kron"

    def check(self, **params: Any) -> None:
        if params["metric"] == "plain" and params["sink"] != self.params["sink"].default:
            raise ValueError("mpo: sink means nothing with metric=plain; leave it out")

    def check_shape(self, shape: Shape, **params: Any) -> None:
        if not _n_terms(shape, params["bits"], params["factors"]):
            least = _term_bits(shape, params["factors"]) / (shape[0] * shape[1])
            raise ValueError(
                f"mpo: bits={params['bits']} hold no term of a weight of shape {tuple(shape)}; "
                f"one takes {least:.2f} bits"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        kind = params["factors"]
        return _n_terms(shape, params["bits"], kind) * _term_bits(shape, kind)

    def kept_values(self, shape: Shape, **params: Any) -> int:
        terms = _n_terms(shape, params["bits"], params["factors"])
        return min(terms * sum(_sizes(shape)), shape[0] * shape[1])

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        shape, kind = (W.shape[0], W.shape[1]), params["factors"]
        self.check_shape(shape, **params)
        if params["metric"] == "kron":
            H = self.required(stats, [W]).hessian(sink=params["sink"])
            roots = [_root(H) for H in nearest_kronecker(H.double(), split(shape[1]))]
        else:
            roots = [torch.eye(n, dtype=torch.float64, device=W.device) for n in split(shape[1])]
        M = rearranged(_weighed(W.double(), roots))
        U, S, Vt = svd(M)
        terms = _n_terms(shape, params["bits"], kind)
        size = S[:terms].sqrt()
        P, Q = (U[:, :terms] * size).T, Vt[:terms] * size[:, None]
        state = pack_factor("P", _times_inverse(P, roots[0]), kind)
        if kind not in FLOATS:  # the best Q for the rounded P takes up its error
            P = unpack_factor("P", state, P.shape[1], kind).double()
            P = (P.view(terms, -1, len(roots[0])) @ roots[0]).flatten(1)
            Q = least_squares(P.T, M)
        return state | pack_factor("Q", _times_inverse(Q, roots[1]), kind)

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        P, Q = (
            unpack_factor(name, state, n, params["factors"]).float()
            for name, n in zip("PQ", _sizes(shape), strict=True)
        )
        (r1, r2), (c1, c2) = split(shape[0]), split(shape[1])
        M = (P.T @ Q).view(r1, c1, r2, c2)
        return M.transpose(1, 2).reshape(shape).to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        terms = _n_terms(shape, params["bits"], params["factors"])
        sizes = zip("PQ", _sizes(shape), strict=True)
        P, Q = (empty_factor(name, terms, n, params["factors"]) for name, n in sizes)
        return P | Q


@lru_cache(maxsize=4096)
def split(n: int) -> tuple[int, int]:
    """Return a, b with a * b = n and a <= b, as near to each other as they can be."""
    a = next(a for a in range(int(n**0.5), 0, -1) if n % a == 0)
    return a, n // a


def rearranged(W: Tensor) -> Tensor:
    """Return W (r1 r2, c1 c2) as (r1 c1, r2 c2): a Kronecker product has rank 1 in it."""
    (r1, r2), (c1, c2) = split(W.shape[0]), split(W.shape[1])
    return W.reshape(r1, r2, c1, c2).transpose(1, 2).reshape(r1 * c1, r2 * c2)


def nearest_kronecker(H: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return H1 (c1, c1) and H2 (c2, c2), not negative, with the least |H - H1 (x) H2|."""
    c1, c2 = sides
    blocks = H.view(c1, c2, c1, c2)
    H2 = torch.einsum("iaib->ab", blocks)
    for _ in range(_ITERATIONS):  # of positive operators: starts and stays positive
        H1 = torch.einsum("iajb,ab->ij", blocks, H2 / H2.norm().clamp(min=1e-300))
        H2 = torch.einsum("iajb,ij->ab", blocks, H1 / H1.norm().clamp(min=1e-300))
    return H1 / H1.norm().clamp(min=1e-300), H2


def _root(H: Tensor) -> Tensor:
    """Return lower L with L L^T = H, damped."""
    H = H.clone()
    H.diagonal().add_(_DAMP * H.diagonal().mean().clamp(min=1e-30))
    return cholesky(H)


def _weighed(W: Tensor, roots: list[Tensor]) -> Tensor:
    """Return W (L1 (x) L2)."""
    L1, L2 = roots
    blocks = W.view(W.shape[0], len(L1), len(L2))
    return torch.einsum("oab,ac,bd->ocd", blocks, L1, L2).reshape(W.shape)


def _times_inverse(X: Tensor, L: Tensor) -> Tensor:
    """Return the matrices X (terms, r c) times L^-1, L (c, c) lower."""
    matrices = X.unflatten(1, (-1, len(L)))
    return torch.linalg.solve_triangular(L, matrices, upper=False, left=False).flatten(1)


def _sizes(shape: Shape) -> tuple[int, int]:
    """Return how many numbers P_i and Q_i have."""
    (r1, r2), (c1, c2) = split(shape[0]), split(shape[1])
    return r1 * c1, r2 * c2


def _term_bits(shape: Shape, kind: str) -> int:
    return sum(factor_bits(1, n, kind) for n in _sizes(shape))


def _n_terms(shape: Shape, bits: float, kind: str) -> int:
    """Return how many terms fit into `bits` per weight; no more than make up any weight."""
    fit = int(bits * shape[0] * shape[1]) // _term_bits(shape, kind)
    return min(fit, *_sizes(shape))
