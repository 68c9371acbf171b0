"""ggml's own encoder, called in the shared library of the `xllamacpp` wheel."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .types import Kind

EXTRA = 'pip install "hf-evopress[gguf]"'


def encode(kind: Kind, W: Tensor, importance: Tensor | None) -> Tensor:
    """Return the bytes of the rows of W (n, columns) float32, (n, row bytes) uint8 on the CPU.

    importance (columns,): what an error of each input's weights counts, or None.
    """
    W = W.detach().to("cpu", torch.float32).contiguous()
    rows, columns = W.shape
    out = torch.zeros(rows, kind.row_bytes(columns), dtype=torch.uint8)
    weights = None
    if importance is not None:
        importance = importance.detach().to("cpu", torch.float32).contiguous()
        weights = importance.data_ptr()
    made = _library()(kind.number, W.data_ptr(), out.data_ptr(), 0, rows, columns, weights)
    if made != out.numel():
        raise RuntimeError(
            f"ggml made {made} bytes of a weight of shape {(rows, columns)} at {kind.name}, not "
            f"{out.numel()}: this xllamacpp has another ggml than we know; please report this"
        )
    return out


@lru_cache(maxsize=None)
def _library() -> Any:
    """Return ggml_quantize_chunk(type, from, to, start, rows, columns, importance)."""
    try:
        from xllamacpp import xllamacpp
    except ImportError as error:
        raise ImportError(
            f"levels of gguf are made by ggml, which comes with xllamacpp: {EXTRA}"
        ) from error
    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return function
