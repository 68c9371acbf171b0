"""Viterbi's algorithm on a GPU in two kernels, where tensor operations take fifteen a step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .walks import own_bits

logger = logging.getLogger(__name__)

STATES = 512  # of a warp, whose registers hold what they cost and stand for
DEVICES = ("cuda", "xpu")
CHECKED = 4  # walks of the first batch of a kind, which are looked for by other code as well
NEVER = 1e30  # more than any walk costs
_BLOCK = 128  # walks that one program goes back along

Kind = tuple[torch.device, int, float, int, bool]

_failed: dict[Kind, BaseException] = {}
_checked: set[Kind] = set()


def serves(kind: Kind) -> bool:
    """Return whether these kernels look for walks of a kind."""
    return kind[0].type in DEVICES and kind not in _failed


def nearest_walks_triton(
    x: Tensor, values: Tensor, bits: float, past: Tensor | None, *, batch: int
) -> Tensor:
    """Return what `nearest_walks` does, `batch` walks at a time."""
    x, values = x.contiguous(), values.contiguous()
    states = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    past = None if past is None else past.int().contiguous()
    index = x.device.index
    there = nullcontext() if index is None else torch.accelerator.device_index(index)
    with there:  # Triton launches on the card in use
        for low in range(0, len(x), batch):
            some = slice(low, low + batch)
            _write(x[some], values, bits, None if past is None else past[some], states[some])
    return states


def _write(x: Tensor, values: Tensor, bits: float, past: Tensor | None, states: Tensor) -> None:
    (n, length), (even, odd) = x.shape, own_bits(bits)
    pasts = values.numel() >> even
    came_from = torch.empty(n, length, pasts, dtype=torch.uint8, device=x.device)
    ends = torch.empty(n, dtype=torch.int32, device=x.device)
    given = {"came_from": came_from, "ends": ends, "length": length, "PASTS": pasts}
    given |= {"EVEN": even, "ODD": odd}
    seen = {"x": x, "values": values, "past": past}
    most = 32 if torch.version.hip is None else 16
    warps = min(most, max(1, values.numel() // STATES))
    launch("forward", (n,), {**seen, **given, "NEVER": NEVER}, num_warps=warps)
    given |= {"states": states, "n": n, "BLOCK": _BLOCK}
    launch("backward", (-(-n // _BLOCK),), given, num_warps=_BLOCK // 32)


def launch(name: str, grid: tuple[int, ...], given: Mapping[str, Any], *, num_warps: int) -> None:
    """Run a kernel; sums and products are rounded one by one, as everywhere."""
    kernel = getattr(import_module(".triton_viterbi", __package__), name)
    kernel[grid](**given, num_warps=num_warps, enable_fp_fusion=False)


def give_up(kind: Kind, error: BaseException) -> None:
    """Look for walks of a kind by tensor operations from now on, and warn once."""
    logger.warning(
        "the Triton kernels of trellis codes do not work here (%s: %s): walks of 2^%d states are "
        "looked for by tensor operations, which is slower",
        type(error).__name__,
        str(error).strip().partition("\n")[0],
        kind[1].bit_length() - 1,
    )
    _failed[kind] = error


def is_right(kind: Kind, x: Tensor, found: Tensor, wanted: Tensor) -> bool:
    """Return whether walks along x are those of the reference; remembered for their kind."""
    if not bool(torch.isfinite(x).all()):
        return True  # nothing to compare: the next call is looked at
    right = torch.equal(found, wanted)
    if right:
        _checked.add(kind)
    return right


def has_checked(kind: Kind) -> bool:
    """Return whether walks of a kind have been compared with the reference."""
    return kind in _checked


def kind_of(x: Tensor, values: Tensor, bits: float, past: Tensor | None) -> Kind:
    """Return what walks have in common that one kernel looks for: device, states, bits, length,
    and whether they are free."""
    return x.device, values.numel(), bits, x.shape[1], past is None
