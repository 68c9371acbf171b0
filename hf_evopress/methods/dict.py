"""A sparse dictionary: each row of a weight is a sum of a few atoms out of one set per layer.

CoSpaDi (Shopkhoev et al. 2025, arXiv:2509.22075): W = Z A with atoms A (k, in) and rows of Z
(out, k) that keep s of k coefficients, for the least error of the layer's *output*. Atoms start as
the low-rank basis, where keeping the largest coefficients is optimal; then coefficients and atoms
are made in turn (`maths/dictionary.py`). At last atoms are rounded as GPTQ does, coefficients are
found anew for the rounded ones, and rounded with feedback too.

`bits` are bits per weight, all told: of all s whose k = per_value * s atoms fit in, the largest is
taken; k stops at the weight's rank. More coefficients never make a row worse. Stores the atoms, a
mask of one bit per coefficient and the kept values; rows of both factors have a scale. Runs as two
products of k columns.

When to use it: in place of `lowrank`. At the same bytes its error is a quarter to two fifths
smaller (tests/benchmarks/README.md), and it trains as that does: float atoms and values as
factors (`tune --train factors`), of coded ones the scales. It does not reach scalar or trellis
codes of the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Method, Operator, Param, Shape, State
from .maths.dictionary import learn, pursue, round_values, seen, spread
from .maths.factors import (
    BITS,
    FLOATS,
    KINDS,
    empty_factor,
    factor_bits,
    pack_codes,
    pack_factor,
    unpack_factor,
)
from .maths.linalg import DAMP, SINK, Stats
from .maths.metric import Metric
from .maths.obs import Rounding, solve
from .maths.packing import pack, packed_bytes, unpack


class Dict(Method):
    """`dict:bits=3`: atoms of 4 bits, half of which each row uses, in 3 bits per weight."""

    name = "dict"
    needs_stats = True
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "bits": Param(float, "bits per weight, at most", at_least=0.05, at_most=32.0),
        "per_value": Param(float, "atoms per kept coefficient", default=2.0, at_least=1.0),
        "atoms": Param(str, "how atoms are stored", default="int4", choices=KINDS),
        "values": Param(str, "how coefficients are stored", default="int4", choices=KINDS),
        "sweeps": Param(int, "how often atoms are made anew", default=4, at_least=0, at_most=1000),
        "damp": Param(
            float, "share of H's mean diagonal added to round atoms", default=DAMP, at_least=0.0
        ),
        "sink": Param(float, "weight of position 0 in H", default=SINK, at_least=0.0),
    }
    examples = (
        "dict:bits=4",
        "dict:bits=12.8,atoms=float16,values=bfloat16,sweeps=1",
        "dict:bits=6,per_value=1.5,atoms=int8,values=int5,sweeps=2,sink=0.0",
    )

    def check_shape(self, shape: Shape, **params: Any) -> None:
        if not _sizes(shape, *_storage(params))[1]:
            least = _bits_of(shape, 1, *_storage(params)[1:]) / (shape[0] * shape[1])
            raise ValueError(
                f"dict: bits={params['bits']} hold not one coefficient per row of a weight of "
                f"shape {tuple(shape)}; that takes {least:.2f} bits"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return _bits_of(shape, _sizes(shape, *_storage(params))[1], *_storage(params)[1:])

    def kept_values(self, shape: Shape, **params: Any) -> int:
        atoms, n = _sizes(shape, *_storage(params))
        return min(atoms * shape[1] + n * shape[0], shape[0] * shape[1])

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        stats = self.required(stats, [W])
        shape = (W.shape[0], W.shape[1])
        self.check_shape(shape, **params)
        k, n = _sizes(shape, *_storage(params))
        W, H = W.float(), stats.hessian(sink=params["sink"])
        U = Metric(stats, sink=params["sink"]).basis(W)[1][:, :k]
        A = learn(W, H, (U.T @ W.double()).float(), n, params["sweeps"])
        state = _rounded_atoms(A, stats, params)
        B, G = seen(W, H, unpack_factor("atoms", state, shape[1], params["atoms"]))
        places, z = pursue(B, G, n)
        state["mask"] = pack(spread(places, torch.ones_like(z), k).to(torch.uint8), 1)
        if params["values"] in FLOATS:
            return state | pack_factor("values", z, params["values"])
        codes, scales = round_values(G, places, z, BITS[params["values"]])
        return state | pack_codes("values", codes, scales, params["values"])

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        A, Z = _factors(state, shape, params)
        return (Z.float() @ A.float()).to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        (rows, columns), (k, n) = shape, _sizes(shape, *_storage(params))
        mask = torch.empty(rows, packed_bytes(k, 1), dtype=torch.uint8, device="meta")
        return {
            **empty_factor("atoms", k, columns, params["atoms"]),
            "mask": mask,
            **empty_factor("values", rows, n, params["values"]),
        }

    def operator(
        self, state: State, bias: Tensor | None, shape: Shape, dtype: torch.dtype, **params: Any
    ) -> Operator:
        A, Z = (factor.to(dtype) for factor in _factors(state, shape, params))
        return lambda x: F.linear(F.linear(x, A), Z, bias)


def _rounded_atoms(A: Tensor, stats: Stats, params: Mapping[str, Any]) -> State:
    """Return the tensors of atoms A (k, in), scaled to a size that float16 holds."""
    A = A / A.abs().amax(1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    if params["atoms"] in FLOATS:
        return pack_factor("atoms", A, params["atoms"])
    U = stats.inverse_factor(sink=params["sink"], damp=params["damp"])
    maxq = A.new_full((len(A),), 2.0 ** BITS[params["atoms"]] - 1)
    work = A.T.contiguous()
    rounding = Rounding(work, U, maxq, -1, symmetric=True, scale_dtype=torch.float16, clip=True)
    solve(work, U, rounding, rounding.group)
    return pack_codes("atoms", rounding.codes.T, rounding.grids[0][0], params["atoms"])


def _factors(state: State, shape: Shape, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the atoms A (k, in) and the coefficients Z (out, k)."""
    k, n = _sizes(shape, *_storage(params))
    values = unpack_factor("values", state, n, params["values"])
    mask = unpack(state["mask"], 1, k).bool()
    Z = torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
    return unpack_factor("atoms", state, shape[1], params["atoms"]), Z


def _storage(params: Mapping[str, Any]) -> tuple[float, float, str, str]:
    return params["bits"], params["per_value"], params["atoms"], params["values"]


@lru_cache(maxsize=4096)
def _sizes(shape: Shape, bits: float, per_value: float, atoms: str, values: str) -> tuple[int, int]:
    """Return how many atoms, and coefficients per row, fit into `bits`; (0, 0) if none do."""
    budget, low, high = bits * shape[0] * shape[1], 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        if _bits_of(shape, middle, per_value, atoms, values) <= budget:
            low = middle
        else:
            high = middle - 1
    return (_n_atoms(shape, low, per_value), low) if low else (0, 0)


def _n_atoms(shape: Shape, n: int, per_value: float) -> int:
    return min(min(shape), round(per_value * n))


def _bits_of(shape: Shape, n: int, per_value: float, atoms: str, values: str) -> int:
    """Return the bits that n coefficients per row and their atoms take."""
    (rows, columns), k = shape, _n_atoms(shape, n, per_value)
    mask = 8 * rows * packed_bytes(k, 1)
    return factor_bits(k, columns, atoms) + mask + factor_bits(rows, n, values)
