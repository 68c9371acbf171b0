"""A low-rank product B A in place of a weight (LoRD), or of a compression error (EoRA).

`lowrank:rank=r` alone replaces the weight; after a `+` it repairs the error that the terms
before it left. Both are one closed form: B A = U U^T W, U the top eigenvectors of W H W^T,
which is the best rank-r answer for the layer's *output* on the calibration inputs. It is what
SVD-LLM (Wang et al. 2024, arXiv:2403.07378), AFM (Kaushal et al. 2023, arXiv:2309.14021, LoRD)
and EoRA (Liu et al. 2024, arXiv:2410.21271) compute by way of H^-1/2, here without inverse and
damping. Ranks are nested: rank 8 is the first 8 columns of rank 64.

Stores A (rank, in) and B (out, rank): 16 * rank * (out + in) bits; with `factors=int8` or `int4`
half or a quarter of that, plus a 16-bit scale per row of A and of B. A `centred` term adds a
correction of the bias, 16 * out bits. Runs as two thin products, and is trainable. On residuals
of SmolLM2 at 3 bits, 8-bit factors lose nothing and 4-bit ones 0.1 to 2 % of the error.

When to use it: as a term of rank 4 to 16 on q, k and v, whose error spectrum is steep; the
search should choose the rank, as a uniform one loses to more bits. Alone it saves bytes only
below rank out * in / (out + in) and is far behind 4-bit codes; it saves time, and trains well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plans.level import Term
from .base import Operator, Param, Shape, SharedWork, State
from .maths.decompositions import least_squares
from .maths.factors import FLOATS, empty_factor, factor_bits, pack_factor, unpack_factor
from .maths.linalg import Stats
from .maths.metric import METRICS, Metric

BITS = {"int8": 8, "int4": 4}


class LowRank(SharedWork):
    """`lowrank:rank=64`: the best rank-64 stand-in for the layer's output."""

    name = "lowrank"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "rank": Param(int, "columns of B, rows of A", at_least=1),
        "metric": Param(
            str,
            "what error counts: on the layer's inputs, on their variances only, on the weight",
            default="whitened",
            choices=METRICS,
        ),
        "centred": Param(bool, "fit deviations from the mean, correct the bias", default=False),
        "sink": Param(float, "weight of position 0 in the metric", default=0.05, at_least=0.0),
        "factors": Param(
            str, "how A and B are stored", default="float16", choices=(*FLOATS, *BITS)
        ),
        "shared": Param(
            bool, "the terms before are those of the neighbouring block, too", default=False
        ),
    }
    examples = (
        "lowrank:rank=8",
        "lowrank:rank=4,factors=bfloat16,metric=diag",
        "lowrank:rank=3,centred=true,sink=0.0",
        "lowrank:rank=8,factors=int8",
        "lowrank:rank=5,factors=int4,metric=plain",
    )

    def uses_stats(self, **params: Any) -> bool:
        return params["metric"] != "plain" or params["centred"]

    def check_shape(self, shape: Shape, **params: Any) -> None:
        most = min(shape)
        if params["rank"] > most:
            even = shape[0] * shape[1] // sum(shape)
            raise ValueError(
                f"lowrank: a weight of shape {tuple(shape)} has at most rank {most}, got "
                f"rank={params['rank']}; above rank {even} the factors are larger than the weight"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        rank, fix = params["rank"], 16 * shape[0] if params["centred"] else 0
        A, B = (rank, shape[1]), (shape[0], rank)
        return sum(factor_bits(n, m, params["factors"]) for n, m in (A, B)) + fix

    def kept_values(self, shape: Shape, **params: Any) -> int:
        return params["rank"] * sum(shape)

    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input.

        One eigendecomposition per weight and metric, however many ranks are asked for.
        """
        made: list[list[State]] = [[] for _ in settings]
        by_metric: dict[tuple[Any, ...], list[int]] = {}
        for i, params in enumerate(settings):
            if self.uses_stats(**params):
                self.required(stats, Ws)
            key = (params["metric"], params["centred"], params["sink"])
            by_metric.setdefault(key, []).append(i)
        for (metric, centred, sink), members in by_metric.items():
            space = Metric(stats, metric=metric, centred=centred, sink=sink)
            most = max(settings[i]["rank"] for i in members)
            for W in Ws:
                for i in members:
                    self.check_shape((W.shape[0], W.shape[1]), **settings[i])
                U = space.basis(W)[1][:, :most]
                for i in members:
                    made[i].append(_state(W, U[:, : settings[i]["rank"]], space, settings[i]))
        return made

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        A, B = _factors(state, shape, params)
        return (B.float() @ A.float()).to(dtype)

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        A, B = _factors({**state, **_some_rows(state, rows)}, shape, params)
        return (B.float() @ A.float()).to(dtype)

    def bias_fix(self, state: State, **params: Any) -> Tensor | None:
        return state.get("bias_fix")

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        (rows, columns), rank = shape, params["rank"]
        kind = params["factors"]
        state = empty_factor("A", rank, columns, kind) | empty_factor("B", rows, rank, kind)
        if params["centred"]:
            state["bias_fix"] = torch.empty(rows, dtype=_float(params), device="meta")
        return state

    def operator(
        self, state: State, bias: Tensor | None, shape: Shape, dtype: torch.dtype, **params: Any
    ) -> Operator:
        A, B = (factor.to(dtype) for factor in _factors(state, shape, params))
        if "bias_fix" in state:
            fix = state["bias_fix"].to(dtype)
            bias = fix if bias is None else bias + fix
        return lambda x: F.linear(F.linear(x, A), B, bias)


def spectrum(
    W: Tensor,
    stats: Stats | None,
    *,
    metric: str = "whitened",
    centred: bool = False,
    sink: float = 0.05,
) -> Tensor:
    """Return the eigenvalues (min(out, in),) float64 of W H W^T, largest first.

    The whole error curve: the best rank-r answer to W leaves spectrum[r:].sum() of the squared
    output error spectrum.sum(), before factors are rounded.
    """
    return Metric(stats, metric=metric, centred=centred, sink=sink).basis(W)[0]


def factors_of(term: Term, state: State, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of a layer that holds one low-rank `term`."""
    return _factors(state, shape, LowRank().filled(term.kwargs))


def _state(W: Tensor, U: Tensor, space: Metric, params: Mapping[str, Any]) -> State:
    """Return the packed factors of U U^T W; U (out, rank) float64, orthonormal columns."""
    W = W.double()
    A = U.T @ W
    # Both factors get the square root of each component's size, so that neither overflows.
    size = A.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    A, B = A / size[:, None], U * size
    kind = params["factors"]
    if kind in FLOATS:
        state = pack_factor("A", A, kind) | pack_factor("B", B, kind)
    else:
        state = pack_factor("B", B, kind)
        # The best A for the rounded B, in every metric: it takes up B's rounding error.
        B = unpack_factor("B", state, params["rank"], kind).double()
        state |= pack_factor("A", least_squares(B, W), kind)
    if space.mean is not None:
        A, B = _factors(state, (W.shape[0], W.shape[1]), params)
        state["bias_fix"] = _round((W - B.double() @ A.double()) @ space.mean, params)
    return state


def _some_rows(state: State, rows: Tensor) -> State:
    """Return the tensors of the factor B with some of its rows only."""
    return {name: state[name][rows] for name in ("B", "B_codes", "B_scales") if name in state}


def _float(params: Mapping[str, Any]) -> torch.dtype:
    return FLOATS.get(params["factors"], torch.float16)


def _round(X: Tensor, params: Mapping[str, Any]) -> Tensor:
    dtype = _float(params)
    most = torch.finfo(dtype).max
    return X.clamp(-most, most).to(dtype).contiguous()


def _factors(state: State, shape: Shape, params: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) as floats."""
    kind = params["factors"]
    A, B = (
        unpack_factor(name, state, n, kind) for name, n in (("A", shape[1]), ("B", params["rank"]))
    )
    return A, B
