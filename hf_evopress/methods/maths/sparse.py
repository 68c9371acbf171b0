"""Storage of sparse weights: a mask, and the kept values in row-major order.

`sparsity=s` keeps any numel - round(s * numel) weights: a state holds `mask` uint8 (out,
ceil(in / 8)), 1 bit per weight. `pattern=n:m` keeps n of every m neighbours in a row (2:4 as
NVIDIA counts: 2 of 4 are not zero), and holds `places` uint8 (out, packed): per group the number
of its combination, 3 bits per 4 weights for 2:4 and 7 bits per 8 for 4:8, less than a mask.

Kept weights are `values` (kept,) float16 or bfloat16, or with bits=b `codes` uint8 (packed b-bit
codes of all of them) with `scales` and `zeros` per group of group_size neighbours as dense codes
have them. Bits per weight: 16 (1 - s) + 1, or b (1 - s) + 1 + (16 + b) / group_size.

This saves bytes and little time: each call expands the weight first, row by row in the cache where
there is a kernel (loading/kernels). Below sparsity 0.79, 16-bit sparse weights
take more bytes than dense 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base import Grid, Method, Param, Shape, State
from .codes import (
    CODE_PARAMS,
    SCALE_DTYPES,
    TILE,
    check_group_size,
    empty_grid,
    grid_bits,
    n_groups,
    pack_grid,
    unpack_grid,
    wants_one_graph,
)
from .grid import dequantize, find_grid, quantize
from .packing import pack, packed_bytes, unpack

ANY = "any"  # the pattern of unstructured sparsity
FLOAT_BITS = 16
# Groups of 2, 4 and 8 divide the strips of the column loop, and their code fits into a byte.
PATTERNS = tuple(f"{n}:{m}" for m in (2, 4, 8) for n in range(1, m))

SPARSE_PARAMS: Mapping[str, Param] = {
    "sparsity": Param(float, "share of weights that are zero, anywhere", default=0.0),
    "pattern": Param(
        str, "n:m keeps n of every m weights of a row", default=ANY, choices=(ANY, *PATTERNS)
    ),
    "bits": Param(
        int,
        "bits per kept weight, 16 for floats",
        default=FLOAT_BITS,
        choices=(*(CODE_PARAMS["bits"].choices or ()), FLOAT_BITS),
    ),
    "group_size": Param(
        int, "with bits: neighbours that share a scale, -1 for a whole row", default=0, at_least=-1
    ),
    "symmetric": CODE_PARAMS["symmetric"],
    "scales": CODE_PARAMS["scales"],
    "clip": Param(bool, "with bits: search the range of each group", default=True),
    "values": Param(
        str, "without bits: dtype of kept weights", default="float16", choices=tuple(SCALE_DTYPES)
    ),
}


class SparseMethod(Method):
    """A method whose state is kept weights and their places; subclasses choose which to keep."""

    params: ClassVar[Mapping[str, Param]] = SPARSE_PARAMS
    can_follow = True
    is_trainable = True

    def check(self, **params: Any) -> None:
        s, pattern, bits, name = params["sparsity"], params["pattern"], params["bits"], self.name
        if s and pattern != ANY:
            raise ValueError(
                f"{name} takes sparsity or pattern, not both; got sparsity={s},pattern={pattern}"
            )
        if pattern == ANY and not 0 < s < 1:
            given = "neither" if not s else f"sparsity={s}"
            raise ValueError(
                f"{name} needs sparsity=... between 0 and 1, both excluded, or pattern=n:m such "
                f"as pattern=2:4; got {given} (all weights are kept by dense, none by zero)"
            )
        if (bits == FLOAT_BITS) != (params["group_size"] == 0):
            raise ValueError(
                f"{name}: bits=2 to 8 and group_size (-1 for a whole row) go together; "
                f"got bits={bits},group_size={params['group_size']}"
            )
        idle = ("symmetric", "scales", "clip") if bits == FLOAT_BITS else ("values",)
        where = "without" if bits == FLOAT_BITS else "with"
        for key in idle:
            if params[key] != self.params[key].default:
                raise ValueError(
                    f"{name}: {key}={params[key]} means nothing {where} bits=2 to 8; leave it out"
                )
        if pattern != ANY and params["group_size"] > 0 and params["group_size"] % _nm(pattern)[1]:
            raise ValueError(
                f"{name}: group_size={params['group_size']} cuts groups of pattern={pattern}; "
                f"take a multiple of {_nm(pattern)[1]}"
            )

    def kept_values(self, shape: Shape, **params: Any) -> int:
        return n_kept(shape, params)

    def check_shape(self, shape: Shape, **params: Any) -> None:
        if params["pattern"] != ANY and shape[1] % _nm(params["pattern"])[1]:
            raise ValueError(
                f"{self.name}: pattern={params['pattern']} does not divide the {shape[1]} inputs "
                f"of a weight of shape {tuple(shape)}; use sparsity=... instead"
            )
        check_group_size(self.name, shape, params["group_size"])
        if n_kept(shape, params) == 0:
            raise ValueError(
                f"{self.name}: sparsity={params['sparsity']} keeps nothing of a weight of shape "
                f"{tuple(shape)}; use zero"
            )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        bits, kept = params["bits"], n_kept(shape, params)
        places = 8 * shape[0] * places_of(shape, params)[1]
        if bits == FLOAT_BITS:
            return places + 16 * kept
        return places + 8 * packed_bytes(kept, bits) + grid_bits(shape, **params)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        (name, width), bits, kept = places_of(shape, params), params["bits"], n_kept(shape, params)
        state = {name: torch.empty(shape[0], width, dtype=torch.uint8, device="meta")}
        if bits == FLOAT_BITS:
            state["values"] = torch.empty(kept, dtype=SCALE_DTYPES[params["values"]], device="meta")
            return state
        codes = torch.empty(packed_bytes(kept, bits), dtype=torch.uint8, device="meta")
        return state | {"codes": codes} | empty_grid(shape, **params)

    def codes(self, state: State, shape: Shape, **params: Any) -> Grid | None:
        if params["bits"] == FLOAT_BITS:
            return None
        mask = _mask(state, slice(None), shape, params)
        kept = unpack(state["codes"], params["bits"], n_kept(shape, params))
        scale, zero = unpack_grid(state, shape, **params)
        return _with_zeros(mask, kept, zero), scale, zero

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        rows, columns = shape
        if params["bits"] == FLOAT_BITS:
            kept = floats = state["values"]
            scale = zero = kept.new_zeros(1)
        else:
            kept = unpack(state["codes"], params["bits"], n_kept(shape, params))
            scale, zero = unpack_grid(state, shape, **params)
            floats = scale

        def of_rows(some: slice, mask: Tensor, mine: Tensor) -> Tensor:
            if params["bits"] == FLOAT_BITS:
                return torch.zeros_like(mask, dtype=dtype).masked_scatter(mask, mine.to(dtype))
            q = _with_zeros(mask, mine, zero[some]).unflatten(-1, (scale.shape[1], -1))
            return dequantize(q, scale[some], zero[some]).flatten(1).to(dtype)

        if wants_one_graph(floats) or rows * columns <= TILE:
            everything = slice(None)
            return of_rows(everything, _mask(state, everything, shape, params), kept)
        W = torch.empty(shape, dtype=dtype, device=kept.device)
        step, used = max(1, TILE // columns), 0
        for start in range(0, rows, step):
            some = slice(start, start + step)
            mask = _mask(state, some, shape, params)
            n = int(mask.sum())
            W[some] = of_rows(some, mask, kept[used : used + n])
            used += n
        return W


def _with_zeros(mask: Tensor, kept: Tensor, zero: Tensor) -> Tensor:
    """Return codes (out, in): `kept` where the mask is, else zero points, which stand for 0."""
    q = zero.to(torch.uint8).expand(-1, -1, mask.shape[1] // zero.shape[1]).flatten(1)
    return q.masked_scatter(mask, kept)


def n_kept(shape: Shape, params: Mapping[str, Any]) -> int:
    """Return how many weights of `shape` are kept: exact, so that loading knows the sizes."""
    numel = shape[0] * shape[1]
    if params["pattern"] == ANY:
        return numel - round(numel * params["sparsity"])
    n, m = _nm(params["pattern"])
    return numel // m * n


def share(total: int, low: int, high: int, of: int) -> int:
    """Return the part of `total` that falls to low .. high of 0 .. `of`; parts add up exactly."""
    return total * high // of - total * low // of


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest of `scores`, exactly k whatever the ties and k."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(k, sorted=False).indices] = True
    return mask.view(scores.shape)


def largest_of_each(scores: Tensor, pattern: str) -> Tensor:
    """Return the mask of the n largest of each m neighbours in the rows of `scores`."""
    n, m = _nm(pattern)
    groups = scores.unflatten(-1, (-1, m))
    best = groups.topk(n, dim=-1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)


def pack_sparse(
    mask: Tensor, kept: Tensor, grids: tuple[Tensor, Tensor] | None, **params: Any
) -> State:
    """Return the state of the weights that `mask` (out, in) keeps.

    kept (out, in): the weights, or with `grids`, scale and zero point (out, groups), their codes;
    what stands where mask is false does not matter.
    """
    rows, columns = mask.shape
    name, _ = places_of((rows, columns), params)
    if name == "mask":
        state = {name: pack(mask.to(torch.uint8), 1)}
    else:
        state = {name: _number(mask, params["pattern"])}
    chosen = kept[mask]
    if grids is None:
        return state | {"values": to_stored(chosen, params["values"])}
    codes = pack(chosen.to(torch.uint8), params["bits"])
    return state | {"codes": codes} | pack_grid(*grids, **params)


def unpack_sparse(state: State, shape: Shape, **params: Any) -> tuple[Tensor, Tensor]:
    """Return which weights are kept, (out, in) bool, and their codes (out, in), 0 elsewhere."""
    mask = _mask(state, slice(None), shape, params)
    kept = unpack(state["codes"], params["bits"], n_kept(shape, params))
    return mask, torch.zeros_like(mask, dtype=kept.dtype).masked_scatter(mask, kept)


def to_stored(W: Tensor, dtype: str) -> Tensor:
    """Return W in the dtype of stored values; weights too large for it become its largest."""
    most = torch.finfo(SCALE_DTYPES[dtype]).max
    return W.clamp(-most, most).to(SCALE_DTYPES[dtype])


def round_kept(W: Tensor, mask: Tensor, **params: Any) -> State:
    """Return the state of the weights of W (out, in) that `mask` keeps, each rounded by itself."""
    if params["bits"] == FLOAT_BITS:
        return pack_sparse(mask, W, None, **params)
    rows, groups = W.shape[0], n_groups((W.shape[0], W.shape[1]), params["group_size"])
    maxq = float(2 ** params["bits"] - 1)
    # Zeros cost a grid nothing: its range includes 0, which is one of its codes.
    kept = (W * mask).reshape(rows * groups, -1)
    scale, zero = find_grid(
        kept,
        maxq,
        symmetric=params["symmetric"],
        scale_dtype=SCALE_DTYPES[params["scales"]],
        clip=params["clip"],
    )
    q = quantize(kept, scale.unsqueeze(-1), zero.unsqueeze(-1), maxq).view(W.shape)
    return pack_sparse(mask, q, (scale.view(rows, groups), zero.view(rows, groups)), **params)


def _nm(pattern: str) -> tuple[int, int]:
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def places_of(shape: Shape, params: Mapping[str, Any]) -> tuple[str, int]:
    """Return the name and the bytes per row of the tensor that says which weights are kept."""
    if params["pattern"] == ANY:
        return "mask", packed_bytes(shape[1], 1)
    m = _nm(params["pattern"])[1]
    return "places", packed_bytes(shape[1] // m, _number_bits(params["pattern"]))


@lru_cache
def mask_table(pattern: str) -> tuple[tuple[bool, ...], ...]:
    """Return the masks of m weights that keep n, in the order that numbers them."""
    n, m = _nm(pattern)
    return tuple(tuple(j in some for j in range(m)) for some in combinations(range(m), n))


def _number_bits(pattern: str) -> int:
    return (len(mask_table(pattern)) - 1).bit_length()


def _number(mask: Tensor, pattern: str) -> Tensor:
    """Return `places`: the packed numbers of the masks of each group of m neighbours."""
    table = torch.tensor(mask_table(pattern), device=mask.device)
    powers = 2 ** torch.arange(table.shape[1], device=mask.device)
    number = torch.zeros(256, dtype=torch.uint8, device=mask.device)
    number[(table * powers).sum(-1)] = torch.arange(
        len(table), dtype=torch.uint8, device=mask.device
    )
    codes = number[(mask.unflatten(-1, (-1, len(powers))) * powers).sum(-1)]
    return pack(codes, _number_bits(pattern))


def _mask(state: State, some: slice, shape: Shape, params: Mapping[str, Any]) -> Tensor:
    """Return which weights of some rows are kept, (rows, in) bool."""
    if params["pattern"] == ANY:
        return unpack(state["mask"][some], 1, shape[1]).to(torch.bool)
    pattern = params["pattern"]
    table = torch.tensor(mask_table(pattern), device=state["places"].device)
    codes = unpack(state["places"][some], _number_bits(pattern), shape[1] // table.shape[1])
    return table[codes.int()].flatten(1)
