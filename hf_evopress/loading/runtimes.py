"""Runtimes: how a layer computes, and what it prepares from its packed tensors to be faster.

auto      the fastest way that holds nothing besides the packed tensors, chosen per layer: kernels
          that read them as they are stored (kernels/), on a CPU compiled by numba, on a GPU in
          Triton; elsewhere, and for levels without a kernel, as packed.
packed    nothing: the weight is computed at each call. The reference: what was scored.
expanded  the dense weight: dense speed, in dense memory.
triton    auto on a GPU, and refused where there is no Triton.
int4      codes as PyTorch's int4 kernel for CPUs takes them (int4.py), 4.5 bits per weight, twice
          that for levels of 5 to 8 bits. What it cannot take computes as auto does.

What save_pretrained writes is the same for all. `expanded` gives the results of `packed` but for
the order of sums. `auto` does for prompts, trellis codes apart; up to 16 tokens it multiplies the
weight before it is rounded to bfloat16, with sums in float32, which is nearer to the exact product
than `packed` is (on a GPU, for one token). On a CPU codes times bfloat16 are multiplied so up to
32 tokens, and at any length where PyTorch has no instructions for bfloat16. With trellis codes it
rotates the activations instead of the weight.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

import torch

from ..methods import compose
from ..methods.base import Shape
from ..plans.level import Level
from ..plans.plan import Plan
from .int4 import Int4, has_int4_kernel
from .kernels.gpu.launch import why_not
from .kernels.gpu.layer import triton_kernel_of
from .kernels.layer import DTYPES
from .kernels.operators import usable, why_failed
from .runtime import Expanded, Runtime

logger = logging.getLogger(__name__)

AUTO, PACKED, EXPANDED, TRITON = "auto", "packed", "expanded", "triton"
RUNTIMES: dict[str, Runtime | None] = {
    AUTO: None,
    PACKED: None,
    EXPANDED: Expanded(),
    "int4": Int4(),
    TRITON: None,
}
BY_KERNELS = (AUTO, "int4", TRITON)  # what computes with kernels where it has nothing better
KERNELS, TRITON_KERNELS = "by CPU kernels", "by Triton kernels"


def check_runtime(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a model in `dtype` cannot use a runtime on this machine."""
    if not isinstance(RUNTIMES[name], Int4):
        return
    if dtype != torch.bfloat16:
        raise ValueError(
            f"runtime {name!r} computes in bfloat16 and the model is loaded in {dtype}: pass "
            "dtype=torch.bfloat16 to from_pretrained, or take runtime 'auto'"
        )
    if not has_int4_kernel():
        raise ValueError(
            f"PyTorch {torch.__version__} has no int4 kernel for this processor "
            f"({torch.backends.cpu.get_cpu_capability()}): take runtime 'auto'"
        )


def check_device(name: str, device: torch.device) -> None:
    """Raise ValueError where a runtime is not for a device."""
    if isinstance(RUNTIMES[name], Int4) and device.type not in ("cpu", "meta"):
        raise ValueError(
            f"runtime {name!r} is for CPUs and the model is on {device}: take runtime 'auto'"
        )
    if name == TRITON and device.type != "meta" and (reason := why_not(device)) is not None:
        raise ValueError(
            f"runtime {name!r} cannot be had on {device}: {reason}; take runtime 'auto'"
        )


def chosen(
    level: Level, shape: Shape, device: torch.device, dtype: torch.dtype, runtime: str = AUTO
) -> str:
    """Return what `auto` computes a layer with: kernels, or PACKED and why."""
    if dtype not in DTYPES:
        return f"as {PACKED} (no kernels for {str(dtype).removeprefix('torch.')})"
    if device.type in ("cpu", "meta") and runtime != TRITON:
        if failed := why_failed():
            return f"as {PACKED} ({failed})"
        return KERNELS if usable(level, shape) is not None else _without_kernel(level)
    if (reason := why_not(device)) is not None:
        return f"as {PACKED} ({reason})"
    kernel = triton_kernel_of(level, shape)
    if kernel is None:
        return _without_kernel(level)
    if (failure := kernel.failure()) is not None:
        return f"as {PACKED} (Triton kernel {failure.family!r} failed)"
    return TRITON_KERNELS


def _without_kernel(level: Level) -> str:
    return f"as {PACKED} (no kernel for {' + '.join(t.method for t in level.terms)})"


def choices(plan: Plan, device: torch.device) -> dict[str, tuple[str, list[str]]]:
    """Return level -> what `auto` computes it with in bfloat16, and the units that have it.

    Dense and dropped units are left out.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    for unit, level in plan.items():
        if level.is_dense or level.is_drop:
            continue
        known = compose.normalize(level)
        shape = plan.shapes.get(unit, (4096, 4096))  # the choice is the same for all that fit
        choice = chosen(known, shape, device, torch.bfloat16)
        found.setdefault(str(known), (choice, []))[1].append(unit)
    return found


def log_choices(runtime: str, choices: Iterable[str], linears: Iterable[str]) -> None:
    """Say in one line what the layers of a model compute with; a warning where some linear ones
    do not with the runtime that was asked for by its name."""
    counts = Counter(choices)
    said = ", ".join(f"{n} layers {choice}" for choice, n in counts.most_common())
    others = {*linears} - {runtime, TRITON_KERNELS}
    level = logging.WARNING if others and runtime not in (AUTO, PACKED) else logging.INFO
    logger.log(level, "runtime %s: %s", runtime, said or "no compressed layers")
