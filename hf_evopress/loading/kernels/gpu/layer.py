"""The kernels of a layer on a GPU, in Triton: those of ../layer.py with other matrices."""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....base.devices import is_captured
from ....methods import compose
from ....methods.base import Shape
from ....plans.level import DENSE, Level
from .. import task as T
from ..layer import Kernel, kernel_of
from ..matrix import KINDS, Matrix, Tensors
from ..steps import Steps
from .kinds import on_gpu
from .launch import KernelError, why_not
from .lowrank import FAMILY as LOW_RANK
from .lowrank import with_low_rank

logger = logging.getLogger(__name__)

MOST_TOKENS = 64  # up to which weights are unpacked in the kernel that multiplies them
CHECKED = 4  # tokens, or rows, of the first result of a kind
MOST_OFF = 0.05  # of its norm: float16 and bfloat16 weights are off by less than a tenth of that
TILE = 2**24  # weights that are unpacked at once for a matmul after: 32 MB in bfloat16

_failed: dict[str, KernelError] = {}  # by the kernel's name


class TritonKernel(Kernel):
    """Products of activations with a packed weight on a GPU; see Kernel.

    Up to MOST_TOKENS tokens one kernel unpacks and multiplies: for one token in float32, for more
    with weights in the dtype of x. For more tokens, tiles of rows are unpacked for a matmul.

    The first result of each kind on a device is compared with the reference, which is made a part
    at a time: a compiler or a driver that gets it wrong is found out before it matters. That asks
    the device, so it waits until no CUDA graph is being made.
    """

    runtime = "triton"
    most_tokens = MOST_TOKENS
    takes_half = True

    def __init__(self, level: Level, shape: Shape, own: Kernel) -> None:
        terms = [[on_gpu(matrix) for matrix in matrices] for matrices in own._terms]
        super().__init__(level, shape, terms)
        self._sum = with_low_rank(self._terms)
        self.families = frozenset(name for t in terms for m in t for name in m.families)
        self._checked: set[tuple[torch.device, str]] = set()

    def on(self, device: torch.device) -> Kernel | None:
        return None if why_not(device) or self.failure() is not None else self

    def failure(self) -> KernelError | None:
        """Return why one of the kernels that this needs is not used any more."""
        return next((_failed[n] for n in (*self.families, self._name) if n in _failed), None)

    @property
    def _name(self) -> str:
        return f"{'+'.join(sorted(self.families))} at {self.text}"

    def tile(self, tokens: int) -> int:
        return TILE

    def most_of(self, dtype: torch.dtype) -> int:
        return self.most_tokens

    def steps(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Steps:
        y = yield from super().steps(x, state, bias)
        tokens = x.numel() // x.shape[-1]
        way = "one" if tokens == 1 else "few" if tokens <= self.most_tokens else "many"
        if tokens and not self.has_checked(x.device, way):
            given, own = x, y
            if not tells(x.reshape(tokens, -1)[:CHECKED]):
                given = probe(x)
                own = yield from super().steps(given, state, bias)
            some, own = (t.reshape(tokens, -1)[:CHECKED] for t in (given, own))
            names = compose.empty(self.level, self.shape, torch.float32)
            known = {name: state[name] for name in names}
            wanted = compose.product(self.level, known, bias, self.shape, some)
            is_sum = self._sum is not None and way != "many" and not has_failed(LOW_RANK)
            self.check(x.device, way, own, wanted, LOW_RANK if is_sum else "")
        return y

    def _by_rows(self, x: Tensor, state: Tensors, bias: Tensor | None) -> Steps:
        if self._sum is not None and not has_failed(LOW_RANK):
            return self._sum.product(state, x, x.dtype, bias)
        return (yield from super()._by_rows(x, state, bias))

    def look_up(self, ids: Tensor, state: Tensors, dtype: torch.dtype) -> Tensor:
        rows = super().look_up(ids, state, dtype)
        if len(ids) and not self.has_checked(ids.device, "rows"):
            names = compose.empty(self.level, self.shape, torch.float32)
            known, some = {name: state[name] for name in names}, ids[:CHECKED]
            some = some.clamp(0, self.shape[0] - 1)
            wanted = compose.decompress_rows(self.level, known, self.shape, some, dtype)
            own = torch.where((some == ids[:CHECKED]).unsqueeze(-1), rows[:CHECKED], wanted)
            self.check(ids.device, "rows", own, wanted)
        return rows

    def has_checked(self, device: torch.device, way: str) -> bool:
        """Return whether the first result of a kind was compared, or cannot be compared now."""
        return (device, way) in self._checked or is_captured()

    def check(
        self, device: torch.device, way: str, found: Tensor, wanted: Tensor, name: str = ""
    ) -> None:
        """Raise KernelError where the first result of a kind is not that of the reference."""
        found, wanted = found.double(), wanted.double()
        size = float(wanted.norm())
        if not math.isfinite(size):
            return  # nothing to compare with: the next call is looked at
        off = float((found - wanted).norm())
        if not off <= MOST_OFF * size + 1e-6:
            share = f"{100 * off / max(size, 1e-30):.3g} %"
            raise KernelError(name or self._name, ValueError(f"it is {share} off the reference"))
        self._checked.add((device, way))

    def __reduce__(self) -> Any:
        return triton_kernel_of, (self.level, self.shape)


def tells(some: Tensor) -> bool:
    """Return whether products of some tokens say anything of a kernel: those of zeros do not."""
    return bool(some.any() & some.isfinite().all())


def probe(x: Tensor) -> Tensor:
    """Return tokens like x that do, the same at each call: cosines of 0, 1, 2 and so on."""
    return torch.arange(x.numel(), device=x.device).float().cos().to(x.dtype).view(x.shape)


@lru_cache(maxsize=4096)
def triton_kernel_of(level: Level, shape: Shape) -> TritonKernel | None:
    """Return the kernel of a level on a GPU, None where there is none for one of its terms."""
    own = kernel_of(level, shape)
    return None if own is None else TritonKernel(level, shape, own)


@lru_cache(maxsize=256)
def dense_kernel(shape: Shape, dtype: torch.dtype) -> TritonKernel:
    """Return the kernel of a dense weight, for experts among others that are packed."""
    fixed = {"source": T.FLOATS, "scale_kind": KINDS[dtype]}
    own = Kernel(DENSE, shape, [[Matrix(shape, "weight", fixed=fixed)]])
    return TritonKernel(DENSE, shape, own)


def for_device(level: Level, shape: Shape, device: torch.device) -> Kernel | None:
    """Return the kernel that a device other than the CPU can use now."""
    if device.type == "cpu" or why_not(device) is not None:
        return None
    kernel = triton_kernel_of(level, shape)
    return None if kernel is None else kernel.on(device)


def has_failed(family: str) -> bool:
    """Return whether a kernel is not used any more."""
    return family in _failed


def give_up(error: KernelError) -> None:
    """Use a kernel that has failed no more, and warn once."""
    if error.family not in _failed:
        logger.warning(
            "the Triton kernel '%s' of hf_evopress does not work here (%s): layers that need it "
            "compute %s, which is slower",
            error.family,
            error,
            "low-rank terms apart" if error.family == LOW_RANK else "as with runtime 'packed'",
        )
    _failed[error.family] = error
