"""From the terms of a level to the matrices that its products read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...methods.base import Method, Shape
from ...methods.lowrank import BITS as FACTOR_BITS
from ...methods.lowrank import LowRank
from ...methods.maths.codebook import codebook, weyl_multiplier
from ...methods.maths.codes import SCALE_DTYPES, CodedMethod, n_groups
from ...methods.maths.packing import packed_bytes
from ...methods.maths.sparse import ANY, FLOAT_BITS, SparseMethod, mask_table, n_kept, places_of
from ...methods.maths.two_sided import TILE
from ...methods.rows import Rows, parts_of
from ...methods.trellis import Trellis
from . import task as T
from .cpu.compiled import chunk_of, weyl_bytes
from .cpu.weyl import CHUNKS
from .matrix import KINDS, Matrix
from .rotated import Rotated
from .stacked import Stacked

Factors = tuple[Matrix, ...]  # of one term: W, or of a low-rank one A and B with W = B A


def factors(part: Method, params: Mapping[str, Any], suffix: str, shape: Shape) -> Factors | None:
    """Return the matrices of one term whose tensors' names end with `suffix`; None for others."""
    if _reads_as(part, CodedMethod):
        return (_coded(params, suffix, shape),)
    if _reads_as(part, Rows):
        kinds = [_coded(p, suffix, own, prefix) for prefix, own, p in parts_of(shape, params)]
        chunk = min(kind.chunk for kind in kinds)
        return (Stacked(shape, f"top_mask{suffix}", chunk=chunk, top=kinds[0], rest=kinds[1]),)
    if _reads_as(part, SparseMethod):
        return (_sparse(params, suffix, shape),)
    if _reads_as(part, LowRank):
        rank = params["rank"]
        sizes = {"A": (rank, shape[1]), "B": (shape[0], rank)}
        return tuple(_thin(f"{n}{suffix}", s, params, suffix) for n, s in sizes.items())
    if _reads_as(part, Trellis):
        return (_walks(params, suffix, shape),)
    return None


def _reads_as(part: Method, base: Any) -> bool:
    """Return whether a method's packed tensors mean what those of `base` mean."""
    return isinstance(part, base) and all(
        getattr(type(part), name) is getattr(base, name) for name in ("decompress", "operator")
    )


def _coded(params: Mapping[str, Any], suffix: str, shape: Shape, prefix: str = "") -> Matrix:
    bits = params["bits"]
    return Matrix(
        shape,
        f"{prefix}codes{suffix}",
        chunk=chunk_of(shape[1] // n_groups(shape, params["group_size"])),
        fixed={"bits": bits, "width": packed_bytes(shape[1], bits), **_grid(params, shape)},
        **_grid_names(params, suffix, prefix),
    )


def _grid(params: Mapping[str, Any], shape: Shape) -> dict[str, int]:
    return {
        "groups": n_groups(shape, params["group_size"]),
        "scale_kind": KINDS[SCALE_DTYPES[params["scales"]]],
    }


def _grid_names(params: Mapping[str, Any], suffix: str, prefix: str = "") -> dict[str, Any]:
    names = {"scales": f"{prefix}scales{suffix}"}
    return names if params["symmetric"] else {**names, "zeros": f"{prefix}zeros{suffix}"}


def _sparse(params: Mapping[str, Any], suffix: str, shape: Shape) -> Matrix:
    name, width = places_of(shape, params)
    fixed = {"places_width": width, "kept": n_kept(shape, params)}
    masks = None if params["pattern"] == ANY else _masks(params["pattern"])
    if masks is not None:
        fixed["number_bits"] = (len(mask_table(params["pattern"])) - 1).bit_length()
    places, bits = f"{name}{suffix}", params["bits"]
    if bits == FLOAT_BITS:
        fixed |= {"source": T.SPARSE_FLOATS, "scale_kind": KINDS[SCALE_DTYPES[params["values"]]]}
        return Matrix(shape, f"values{suffix}", places=places, fixed=fixed, table=masks)
    return Matrix(
        shape,
        f"codes{suffix}",
        places=places,
        chunk=chunk_of(shape[1] // n_groups(shape, params["group_size"])),
        fixed={**fixed, "source": T.SPARSE_CODES, "bits": bits, **_grid(params, shape)},
        table=masks,
        **_grid_names(params, suffix),
    )


def _walks(params: Mapping[str, Any], suffix: str, shape: Shape) -> Matrix:
    bits, state_bits, is_mma = params["bits"], params["state_bits"], params["order"] == "mma"
    multiplier = chunk = 0
    if params["codebook"] == "weyl" and weyl_bytes():
        multiplier = weyl_multiplier(state_bits, bits) << (16 - state_bits)
        if params["tail_biting"] and not is_mma:
            chunk = next((size for size in CHUNKS if shape[1] % size == 0), 0)
    return Rotated(
        shape,
        f"codes{suffix}",
        fixed={
            "source": T.MMA_WALKS if is_mma else T.WALKS,
            "bits": round(2 * bits),
            "number_bits": state_bits,
            "width": -(-shape[1] // TILE),
            "multiplier": multiplier,
        },
        table=_values(params["codebook"], state_bits, bits),
        rotation=params["rotation"],
        seed=params["seed"],
        scale=f"scale{suffix}" if params["scales"] == "tensor" else None,
        row_scales=f"row_scales{suffix}",
        column_scales=f"column_scales{suffix}",
        codebook=params["codebook"],
        starts=None if params["tail_biting"] else f"starts{suffix}",
        summed=chunk,
    )


@lru_cache(maxsize=None)
def _values(name: str, state_bits: int, bits: float) -> Tensor:
    with torch.device("cpu"):
        return codebook(name, state_bits, bits).float().contiguous()


@lru_cache(maxsize=None)
def _masks(pattern: str) -> Tensor:
    """Return the masks (256, m) uint8 of an n:m pattern by number, with zeros at the end."""
    known = torch.tensor(mask_table(pattern), dtype=torch.uint8, device="cpu")
    made = torch.zeros(256, known.shape[1], dtype=torch.uint8, device="cpu")
    made[: len(known)] = known
    return made


def _thin(name: str, shape: Shape, params: Mapping[str, Any], suffix: str) -> Matrix:
    kind = params["factors"]
    if kind in SCALE_DTYPES:
        fixed = {"source": T.FLOATS, "scale_kind": KINDS[SCALE_DTYPES[kind]]}
        return Matrix(shape, name, fixed=fixed)
    bits, base = FACTOR_BITS[kind], name.removesuffix(suffix)
    fixed = {"bits": bits, "width": packed_bytes(shape[1], bits), "scale_kind": T.FLOAT16}
    return Matrix(shape, f"{base}_codes{suffix}", scales=f"{base}_scales{suffix}", fixed=fixed)
