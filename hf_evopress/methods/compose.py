"""Whole levels: compress, decompress and cost of the terms of a level taken together.

The first term compresses the weight, each later one the error that is left; the tensors of
term i > 0 carry the suffix `_i`. Everything else in the package deals in levels, not methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..base.plugins import load, names
from ..plans.level import Level, Term
from .base import Method, Operator, Shape, State
from .maths.linalg import Stats

_SUFFIXED = re.compile(r"_\d+\Z")


@lru_cache(maxsize=None)
def method(name: str) -> Method:
    """Return the method called `name`; ValueError names the nearest known one."""
    return load("methods", name)()


def methods() -> list[Method]:
    """Return every method that is installed, by name."""
    return [method(name) for name in names("methods")]


@lru_cache(maxsize=4096)
def normalize(level: Level | str) -> Level:
    """Return `level` in canonical form, or raise ValueError that says what is wrong with it."""
    level = Level.parse(level)
    for i, term in enumerate(level.terms):
        if i and not method(term.method).can_follow:
            raise ValueError(f"level '{level}': {term.method} cannot follow another term")
        if term.kwargs.get("shared") is True and i != max(1, len(level.terms) - 1):
            raise ValueError(
                f"level '{level}': shared=true is of a last term, behind what is shared"
            )
    if len(level.terms) > 1 and level.terms[0].method in ("dense", "drop"):
        raise ValueError(f"level '{level}': {level.terms[0].method} leaves no error to compress")
    return Level(tuple(method(t.method).normalize(t) for t in level.terms))


def normalize_each(levels: Mapping[str, Level | str]) -> dict[str, Level]:
    """Return unit -> its level in canonical form; ValueError names the unit of one that is not."""
    found = {}
    for unit, level in levels.items():
        try:
            found[unit] = normalize(level)
        except ValueError as error:
            raise ValueError(f"{unit}: {error}") from error
    return found


def defaults(levels: Iterable[Level]) -> dict[str, dict[str, Any]]:
    """Return method -> its parameters' defaults, for the methods in `levels`: what strings omit."""
    used = sorted({term.method for level in levels for term in level.terms})
    return {name: method(name).filled({}) for name in used}


def check_shape(level: Level, shape: Shape) -> None:
    """Raise ValueError where a weight of `shape` cannot take `level`."""
    for part, params, _ in parts(level):
        part.check_shape(shape, **params)


def needs_stats(level: Level) -> bool:
    """Return whether `level` can be made only with calibration statistics."""
    return any(part.uses_stats(**params) for part, params, _ in parts(level))


def uses_outputs(level: Level) -> bool:
    """Return whether `level` is better for knowing the second moments of the outputs' gradients."""
    return any(part.uses_outputs(**params) for part, params, _ in parts(level))


def cost_bits(level: Level, shape: Shape) -> int:
    """Return the exact number of bits that a weight of `shape` stores at `level`."""
    return sum(part.cost_bits(shape, **params) for part, params, _ in parts(level))


def n_shared(level: Level) -> int:
    """Return how many first terms of `level` are those of the neighbouring block as well."""
    return len(level.terms) - 1 if level.terms[-1].kwargs.get("shared") is True else 0


def shared_bits(level: Level, shape: Shape) -> int:
    """Return the bits that two neighbours at `level` store once."""
    first = list(parts(level))[: n_shared(level)]
    return sum(part.cost_bits(shape, **params) for part, params, _ in first)


def shared_names(level: Level, shape: Shape) -> list[str]:
    """Return the names of the tensors that two neighbours at `level` have in common."""
    first = Level(level.terms[: n_shared(level)])
    return [*empty(first, shape, torch.float32)]


def renumbered(level: Level, state: State, n: int) -> State:
    """Return a state of one term as that of term n of a longer level."""
    return _rename(state, level.terms[0].method, _suffix(n))


def kept_values(level: Level, shape: Shape) -> int:
    """Return how many weights, or entries of factors, a weight of `shape` keeps at `level`."""
    return sum(part.kept_values(shape, **params) for part, params, _ in parts(level))


def compress(level: Level, W: Tensor, stats: Stats | None) -> State:
    """Return the packed tensors of W (out, in) float32 at `level`."""
    return compress_stacked(level, [W], stats)[0]


def compress_stacked(level: Level, Ws: Sequence[Tensor], stats: Stats | None) -> list[State]:
    """Return one state per weight, for weights (out_i, in) that share one input."""
    return compress_many([level], Ws, stats)[0]


def compress_many(
    levels: Sequence[Level], Ws: Sequence[Tensor], stats: Stats | None
) -> list[list[State]]:
    """Return, per level, one state per weight, for weights (out_i, in) that share one input.

    Levels share what they can: one method makes all its first terms in one call, and levels
    that begin with the same term share it and the error that it leaves.
    """
    for W in Ws:
        if not bool(torch.isfinite(W).all()):
            raise ValueError(f"a weight of shape {tuple(W.shape)} contains inf or NaN")
    stats = None if stats is None else stats.or_alike()
    made = _many([level.terms for level in levels], Ws, stats, 0)
    for level, states in zip(levels, made, strict=True):
        for W, state in zip(Ws, states, strict=True):
            _check_made(level, W, state)
    return made


def _check_made(level: Level, W: Tensor, state: State) -> None:
    floats = (tensor for tensor in state.values() if tensor.is_floating_point())
    if not all(bool(tensor.isfinite().all()) for tensor in floats):
        raise ValueError(
            f"level '{level}' cannot hold a weight of shape {tuple(W.shape)}: what it stores would "
            f"be inf or NaN; its largest number is {float(W.abs().max()):.3g}"
        )


def _many(
    levels: Sequence[tuple[Term, ...]], Ws: Sequence[Tensor], stats: Stats | None, depth: int
) -> list[list[State]]:
    by_method: dict[str, dict[Term, list[int]]] = {}
    for i, terms in enumerate(levels):
        by_method.setdefault(terms[0].method, {}).setdefault(terms[0], []).append(i)
    result: list[list[State]] = [[] for _ in levels]
    for name, users in by_method.items():
        part = method(name)
        settings = [part.filled(term.kwargs) for term in users]
        made = part.compress_many(Ws, stats, settings)
        for members, params, states in zip(users.values(), settings, made, strict=True):
            named = [_rename(state, name, _suffix(depth)) for state in states]
            for i in members:
                result[i] = [dict(state) for state in named]
            longer = [i for i in members if len(levels[i]) > 1]
            if not longer:
                continue
            left = [
                W - part.decompress(state, _shape(W), torch.float32, **params)
                for W, state in zip(Ws, states, strict=True)
            ]
            tails = _many([levels[i][1:] for i in longer], left, stats, depth + 1)
            for i, tail in zip(longer, tails, strict=True):
                for state, new in zip(result[i], tail, strict=True):
                    state.update(new)
    return result


def decompress(level: Level, state: State, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) that `state` stands for: the sum of its terms, in `dtype`."""
    (part, params, _), *others = parts(level)
    if not others:
        return part.decompress(state, shape, dtype, **params)
    total = part.decompress(_pick(state, ""), shape, torch.float32, **params)
    for part, params, suffix in others:
        total = total + part.decompress(_pick(state, suffix), shape, torch.float32, **params)
    return total.to(dtype)


def decompress_rows(
    level: Level, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return rows (n,) int64 of the weight that `state` stands for, (n, in) in `dtype`."""
    (part, params, _), *others = parts(level)
    if not others:
        return part.decompress_rows(state, shape, rows, dtype, **params)
    total = part.decompress_rows(_pick(state, ""), shape, rows, torch.float32, **params)
    for part, params, suffix in others:
        own = _pick(state, suffix)
        total = total + part.decompress_rows(own, shape, rows, torch.float32, **params)
    return total.to(dtype)


def product(level: Level, state: State, bias: Tensor | None, shape: Shape, x: Tensor) -> Tensor:
    """Return x W^T + bias (n, out) float32 for x (n, in), holding a part of W at a time where the
    level's methods can make one: to compare a kernel with, in little memory."""
    y: Any = 0.0 if bias is None else bias.float()
    for part, params, suffix in parts(level):
        y = y + part.product(x, _pick(state, suffix), shape, **params)
    fix = bias_fix(level, state)
    return y if fix is None else y + fix


def looks_up_rows(level: Level) -> bool:
    """Return whether rows at `level` can be had without the whole weight."""
    return all(part.looks_up_rows for part, _, _ in parts(level))


def bias_fix(level: Level, state: State) -> Tensor | None:
    """Return what `state` adds to the layer's bias, (out,) float32, or None for nothing."""
    total: Tensor | None = None
    for part, params, suffix in parts(level):
        fix = part.bias_fix(_pick(state, suffix), **params)
        if fix is not None:
            total = fix.float() if total is None else total + fix.float()
    return total


def empty(level: Level, shape: Shape, dtype: torch.dtype) -> State:
    """Return the tensors of a state of `level` on the meta device, for loading."""
    return {
        f"{k}{suffix}": v
        for part, params, suffix in parts(level)
        for k, v in part.empty(shape, dtype, **params).items()
    }


def operator(
    level: Level, state: State, bias: Tensor | None, shape: Shape, dtype: torch.dtype
) -> Operator:
    """Return x (..., in) -> (..., out), the sum of the terms' operators."""
    made = [
        part.operator(_pick(state, suffix), None if suffix else bias, shape, dtype, **params)
        for part, params, suffix in parts(level)
    ]
    return made[0] if len(made) == 1 else _sum(made)


def terms(level: Level, state: State) -> Iterator[tuple[Method, dict[str, Any], State, str]]:
    """Yield for each term of `level` its method, all parameters, tensors, and their suffix."""
    for part, params, suffix in parts(level):
        yield part, params, _pick(state, suffix), suffix


def _sum(operators: Sequence[Operator]) -> Callable[[Tensor], Tensor]:
    def total(x: Tensor) -> Tensor:
        y = operators[0](x)
        for other in operators[1:]:
            y = y + other(x)
        return y

    return total


def parts(level: Level) -> Iterator[tuple[Method, dict[str, Any], str]]:
    """Yield for each term of `level` its method, all parameters, and its tensors' suffix."""
    for part, params, suffix in _resolved(level):
        yield part, dict(params), suffix


@lru_cache(maxsize=4096)
def _resolved(level: Level) -> tuple[tuple[Method, dict[str, Any], str], ...]:
    found = ((method(term.method), term, _suffix(i)) for i, term in enumerate(level.terms))
    return tuple((part, part.filled(term.kwargs), suffix) for part, term, suffix in found)


def _suffix(i: int) -> str:
    return f"_{i}" if i else ""


def _rename(state: State, method_name: str, suffix: str) -> State:
    for name in state:
        if _SUFFIXED.search(name):
            raise ValueError(
                f"{method_name} calls a tensor {name!r}; an ending such as _1 is the number of a "
                "term of the level, so the method has to choose another name"
            )
    return {f"{name}{suffix}": tensor for name, tensor in state.items()}


def _pick(state: State, suffix: str) -> State:
    """Return the tensors of one term: those with `suffix`, or without any for the first."""
    if suffix:
        return {k.removesuffix(suffix): v for k, v in state.items() if k.endswith(suffix)}
    return {k: v for k, v in state.items() if not _SUFFIXED.search(k)}


def _shape(W: Tensor) -> Shape:
    return (W.shape[0], W.shape[1])
