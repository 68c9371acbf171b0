"""The interface of compression methods: pure functions between a weight and packed tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.plugins import did_you_mean
from ..plans.level import Term, Value
from .maths.linalg import Stats
from .maths.recompute import forgetful_linear

Shape = tuple[int, int]  # (out_features, in_features)
Grid = tuple[Tensor, Tensor, Tensor]  # codes, scales and zero points
State = dict[str, Tensor]  # packed tensors by name, as they are written to a checkpoint
Operator = Callable[[Tensor], Tensor]  # x (..., in_features) -> (..., out_features)
PART = 2**20  # weights that are decoded at once where memory is short


@dataclass(frozen=True)
class Param:
    """One parameter of a method: its type, what it may be, and its default.

    A parameter without default must be written in the level; one that equals its default is
    left out of the canonical level string.
    """

    kind: type
    doc: str
    default: Value | None = None
    choices: tuple[Value, ...] | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_required(self) -> bool:
        return self.default is None

    def check(self, method: str, name: str, value: Value) -> Value:
        """Return `value` as `kind`; raise ValueError that names it and what is allowed."""
        given = value
        if self.kind is float and type(value) is int:
            value = float(value)
        if self.kind is str and not isinstance(value, str):
            value = str(value)
        if self.kind is float and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{method} needs a finite {name}, got {name}={value}")
        if type(value) is not self.kind:
            raise ValueError(
                f"{method} needs {name} to be {self.kind.__name__}, got {name}={value}"
            )
        if self.choices is not None and value not in self.choices:
            allowed = ", ".join(map(str, self.choices))
            raise ValueError(f"{method} takes {name} from {allowed}; got {name}={given}")
        if self.choices is not None:
            value = next(choice for choice in self.choices if choice == value)  # 3, not 3.0
        if self.at_least is not None and value < self.at_least:  # type: ignore[operator]
            raise ValueError(f"{method} needs {name} >= {self.at_least}, got {name}={value}")
        if self.at_most is not None and value > self.at_most:  # type: ignore[operator]
            raise ValueError(f"{method} needs {name} <= {self.at_most}, got {name}={value}")
        return value


class Method(ABC):
    """A family of levels.

    Weights are W (out_features, in_features) float32. A method sees tensors only, never a
    model, a path or another method; one file holds one method, named as the file is.
    """

    name: ClassVar[str]
    params: ClassVar[Mapping[str, Param]] = {}
    needs_stats: ClassVar[bool] = False  # compress() cannot work without calibration
    can_follow: ClassVar[bool] = False  # may stand after a `+`, on the error that is left
    is_trainable: ClassVar[bool] = (
        False  # the floats of its state get gradients that mean something
    )
    examples: ClassVar[tuple[str, ...]] = ()  # levels to try on a (24, 64) weight

    def normalize(self, term: Term) -> Term:
        """Return `term` in canonical form: values checked, defaults left out."""
        values = term.kwargs
        for key in values:
            if key not in self.params:
                known = list(self.params)
                raise ValueError(f"{self.name} has no parameter {key!r}{did_you_mean(key, known)}")
        for key, param in self.params.items():
            if key in values:
                values[key] = param.check(self.name, key, values[key])
            elif param.is_required:
                allowed = f", one of {', '.join(map(str, param.choices))}" if param.choices else ""
                raise ValueError(
                    f"{self.name} needs {key}=... ({param.doc}{allowed}); got '{term}'"
                )
        kept = {k: v for k, v in values.items() if v != self.params[k].default}
        self.check(**self.filled(kept))
        return Term.of(self.name, **kept)

    def filled(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """Return `values` with every default filled in."""
        return {k: values.get(k, p.default) for k, p in self.params.items()}

    def check(self, **params: Any) -> None:
        """Raise ValueError where parameters, each valid alone, do not go together."""

    def check_shape(self, shape: Shape, **params: Any) -> None:
        """Raise ValueError, with the way out, where a weight of `shape` cannot take these."""

    def uses_stats(self, **params: Any) -> bool:
        """Return whether compress() needs calibration statistics at these parameters."""
        return self.needs_stats

    def uses_outputs(self, **params: Any) -> bool:
        """Return whether compress() makes use of `Stats.outputs` where they are known."""
        return False

    def required(self, stats: Stats | None, Ws: Sequence[Tensor]) -> Stats:
        """Return `stats`, or raise ValueError where they are missing or of another layer."""
        if stats is None:
            raise ValueError(
                f"{self.name} needs calibration statistics of the layer's inputs, got none; "
                "calibrate first, or use a data-free level such as rtn"
            )
        for W in Ws:
            if W.shape[1] != stats.gram.shape[0]:
                raise ValueError(
                    f"{self.name}: a weight of shape {tuple(W.shape)} has {W.shape[1]} inputs, "
                    f"its statistics have {stats.gram.shape[0]}"
                )
        return stats

    @abstractmethod
    def cost_bits(self, shape: Shape, **params: Any) -> int:
        """Return the exact number of bits that compress() stores for a weight of `shape`."""

    def kept_values(self, shape: Shape, **params: Any) -> int:
        """Return how many values are kept: weights that may be other than zero, or entries of
        factors. What a sparsity budget counts, whatever bits they take."""
        return shape[0] * shape[1]

    @abstractmethod
    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        """Return the packed tensors of W (out, in) float32."""

    @abstractmethod
    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        """Return the weight (out, in) in `dtype`; computed in float32 and cast last."""

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        """Return rows (n,) int64 of the weight, (n, in) in `dtype`: what an embedding looks up.

        Override where rows can be had without the whole weight; the numbers must be the same.
        """
        return self.decompress(state, shape, dtype, **params)[rows]

    @property
    def looks_up_rows(self) -> bool:
        """Whether some rows can be had without the whole weight, as an embedding needs."""
        return type(self).decompress_rows is not Method.decompress_rows

    def product(self, x: Tensor, state: State, shape: Shape, **params: Any) -> Tensor:
        """Return x W^T (n, out) float32 for x (n, in), holding a part of the weight at a time.

        Override where parts that are no rows can be had without the whole weight.
        """
        if not self.looks_up_rows:
            return x.float() @ self.decompress(state, shape, torch.float32, **params).T
        rows = torch.arange(shape[0], device=x.device).split(max(1, PART // shape[1]))
        return torch.cat(
            [
                x.float() @ self.decompress_rows(state, shape, some, torch.float32, **params).T
                for some in rows
            ],
            dim=1,
        )

    @abstractmethod
    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        """Return the tensors of a state on the meta device; `dtype` is for unscaled floats."""

    def codes(self, state: State, shape: Shape, **params: Any) -> Grid | None:
        """Return the integer codes that decompress() reads, or None where there are none.

        q (out, in) uint8, scale and zero (out, groups, 1) float32: the weight is
        (q - zero) * scale with zero points that are codes themselves. Runtimes hand them to
        integer kernels.
        """
        return None

    def bias_fix(self, state: State, **params: Any) -> Tensor | None:
        """Return what operator() adds to the layer's bias, (out,), or None for nothing.

        A dense copy of the layer is decompress() and the bias plus this.
        """
        return None

    def compress_stacked(
        self, Ws: Sequence[Tensor], stats: Stats | None, **params: Any
    ) -> list[State]:
        """Return the states of weights that share one input; override to do them in one pass."""
        return [self.compress(W, stats, **params) for W in Ws]

    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input.

        Override where settings can share work, as the bit-widths of one Hessian do.
        """
        return [self.compress_stacked(Ws, stats, **params) for params in settings]

    def operator(
        self, state: State, bias: Tensor | None, shape: Shape, dtype: torch.dtype, **params: Any
    ) -> Operator:
        """Return x -> x W^T + bias with everything that does not depend on x done once.

        The evaluator keeps operators, the loaded layer makes one per call: the same numbers.
        Where only x or the bias gets a gradient, the graph does not keep W but makes it again.
        """

        def weight() -> Tensor:
            return self.decompress(state, shape, dtype, **params)

        W = weight()

        def run(x: Tensor) -> Tensor:
            if W.requires_grad or not x.requires_grad or not torch.is_grad_enabled():
                return F.linear(x, W, bias)
            return forgetful_linear(x, W, bias, weight)

        return run


class SharedWork(Method):
    """A method whose weights and settings share work: all go through `compress_many`."""

    @abstractmethod
    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input."""

    def compress_stacked(
        self, Ws: Sequence[Tensor], stats: Stats | None, **params: Any
    ) -> list[State]:
        return self.compress_many(Ws, stats, [params])[0]

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        return self.compress_many([W], stats, [params])[0][0]
