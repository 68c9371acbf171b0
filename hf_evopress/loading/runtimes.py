"""Runtimes: how a layer computes, and what it prepares from its packed tensors to be faster.

packed    nothing: the weight is computed at each call, in the memory of the checkpoint.
expanded  the dense weight: dense speed, in dense memory.
int4      codes as PyTorch's int4 kernel for CPUs takes them, 4.5 bits per weight, twice that for
          levels of 5 to 8 bits: for generating token by token, which waits for memory. Prompts
          are computed as packed ones are. The kernel computes in bfloat16.

What save_pretrained writes is the same for all. `packed` gives the results that were measured and
`expanded` the same but for the order of sums. `int4` rounds scales, not weights, to bfloat16: it
is off by what a dense bfloat16 model is off.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import compose
from ..methods.base import Method, Shape, State
from ..plans.level import Level

logger = logging.getLogger(__name__)

PACKED = "packed"
KERNEL_GROUPS = (256, 128, 64, 32)  # weights per scale that the int4 kernel takes
KERNEL_ROWS = 16  # its outputs come in multiples of this
MIDDLE = 8  # its code for 0
# Tokens up to which it beats computing the weight: its time grows with every token, even at 50
# for a weight of 4096 x 4096 (tests/benchmarks/decode.py).
MOST_TOKENS = 32


class Runtime(ABC):
    """Tensors made once from the packed ones of a layer, and an input's way through them."""

    @abstractmethod
    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        """Return the tensors to keep; none where the packed layer is as fast."""

    @abstractmethod
    def takes(self, x: Tensor, made: State) -> bool:
        """Return whether run() can do this x; if not, it goes through the packed tensors."""

    @abstractmethod
    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        """Return what the packed layer returns for x (..., in_features)."""


class Expanded(Runtime):
    """The dense weight in the dtype of the model."""

    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        return {"weight": compose.decompress(level, state, shape, dtype)}

    def takes(self, x: Tensor, made: State) -> bool:
        return x.dtype == made["weight"].dtype

    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        W, fix = made["weight"], compose.bias_fix(level, state)
        if fix is not None:
            bias = fix.to(W.dtype) if bias is None else bias + fix.to(W.dtype)
        return F.linear(x, W, bias)


class Int4(Runtime):
    """Codes for the int4 kernel of CPUs, or the dense weight of levels that it cannot take."""

    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        part, params, own, _ = next(compose.terms(level, state))
        if type(part).operator is not Method.operator:
            return {}  # such as thin factors: there is no weight to compute
        found = part.codes(own, shape, **params) if _has_kernel(own, dtype) else None
        group = None if found is None else _kernel_group(shape[1] // found[1].shape[1])
        if found is None or group is None:
            return EXPANDED.make(level, state, shape, dtype)
        q, scale, zero = found
        spread = shape[1] // group // scale.shape[1]
        scale, zero = (x.repeat_interleave(spread, dim=1) for x in (scale, zero))
        planes = [_for_kernel(*plane) for plane in _planes(q, scale, zero)]
        return {
            "codes": torch.stack([codes for codes, _ in planes]),
            "grids": torch.stack([grid for _, grid in planes]),
        }

    def takes(self, x: Tensor, made: State) -> bool:
        if "weight" in made:
            return EXPANDED.takes(x, made)
        needs_graph = x.requires_grad and torch.is_grad_enabled()
        is_short = x.numel() <= MOST_TOKENS * x.shape[-1]
        return bool(made) and x.dtype == torch.bfloat16 and is_short and not needs_graph

    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        if "weight" in made:
            return EXPANDED.run(x, made, level, state, shape, bias)
        flat, group = x.reshape(-1, shape[1]), shape[1] // made["grids"].shape[1]
        planes = zip(made["codes"], made["grids"], strict=True)
        parts = [_kernel(flat, codes, group, grid)[:, : shape[0]] for codes, grid in planes]
        for part, params, own, _ in list(compose.terms(level, state))[1:]:
            parts.append(part.operator(own, None, shape, x.dtype, **params)(flat))
        parts += [] if bias is None else [bias]
        total = parts[0]
        for term in parts[1:]:
            total = total.float() + term  # rounded to bfloat16 once, when it is complete
        return total.to(x.dtype).view(*x.shape[:-1], shape[0])


EXPANDED = Expanded()
RUNTIMES: dict[str, Runtime | None] = {PACKED: None, "expanded": EXPANDED, "int4": Int4()}


def check_runtime(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a model in `dtype` cannot use a runtime, warn where it is no use."""
    if not isinstance(RUNTIMES[name], Int4):
        return
    if dtype != torch.bfloat16:
        raise ValueError(
            f"runtime {name!r} computes in bfloat16 and the model is loaded in {dtype}: pass "
            "dtype=torch.bfloat16 to from_pretrained, or take runtime 'expanded'"
        )
    if not has_int4_kernel():
        logger.warning(
            "PyTorch %s has no int4 kernel for this processor (%s): layers hold dense weights",
            torch.__version__,
            torch.backends.cpu.get_cpu_capability(),
        )


def _kernel(x: Tensor, codes: Tensor, group: int, grid: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, grid)


@lru_cache(maxsize=None)
def has_int4_kernel() -> bool:
    """Return whether this PyTorch has the kernel for this processor, not only its reference."""
    known = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return known and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _has_kernel(state: State, dtype: torch.dtype) -> bool:
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in state.values())
    return is_on_cpu and dtype == torch.bfloat16 and has_int4_kernel()


def _kernel_group(group: int) -> int | None:
    """Return the largest group of the kernel that divides this one: 192 is three of 64."""
    return next((g for g in KERNEL_GROUPS if group % g == 0), None)


def _planes(q: Tensor, scale: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return codes below 16 (out, in) with scale and shift (out, groups): the weight is the sum
    over planes of (codes - 8) * scale + shift.

    q (out, in) uint8, scale and zero (out, groups, 1). The codes of a group are moved until its
    zero point is the kernel's own 0, as far as there is room: a shift of 0 needs no rounding.
    """
    q = q.to(torch.int32).unflatten(1, (scale.shape[1], -1))
    low, high = q.amin(-1, keepdim=True), q.amax(-1, keepdim=True)
    fits = int((high - low).max()) < 16
    most, middle = (15, MIDDLE) if fits else (255, 17 * MIDDLE)
    wanted = middle - zero.to(torch.int32)
    moved = torch.minimum(torch.maximum(wanted, -low), most - high)
    q, shift = (q + moved).flatten(1), ((wanted - moved) * scale).squeeze(-1)
    scale = scale.squeeze(-1)
    if fits:
        return [(q, scale, shift)]
    return [(q >> 4, 16 * scale, torch.zeros_like(shift)), (q & 15, scale, shift)]


def _for_kernel(q: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (out', in / 2) uint8 and scale and shift (groups, out', 2) bfloat16.

    out' is out, rounded up to what the kernel takes.
    """
    more = -q.shape[0] % KERNEL_ROWS
    grid = F.pad(torch.stack([scale, shift], dim=-1), (0, 0, 0, 0, 0, more)).transpose(0, 1)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(q, (0, 0, 0, more)), 1)
    return codes, grid.contiguous().to(torch.bfloat16)
