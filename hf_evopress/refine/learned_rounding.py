"""Learned rounding: codes, scales and factors of a block tuned on the block's own output.

A code is a latent number that is rounded on the way in; its gradient passes the rounding
unchanged. Signs of gradients move the latents, so that the step size says how many codes may
change at all, as in SignRound (Cheng et al. 2023, arXiv:2309.05516). There a latent starts at the
weight in units of its scale; here at the code that GPTQ chose, leaning towards the weight it was
made from. Scales are rounded to the dtype they are stored in at every step, zero points to codes;
together they are the clip of a group's range. Which weights a sparse level keeps stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import compose
from ..methods.base import Shape, State
from ..methods.maths.codes import CodedMethod, pack_state, unpack_grid
from ..methods.maths.grid import round_scale
from ..methods.maths.packing import unpack
from ..methods.maths.sparse import SparseMethod, pack_sparse, unpack_sparse
from ..plans.level import Level

LEAN = 0.45  # how far a latent may start from its code, in codes; 0.5 is where the next begins
CLIPPED = 0.449  # a latent that leans further than this at an end of the range would be beyond it


class TunedLevel:
    """A weight at a level as a function that has gradients: of latent codes, scales, factors.

    level, state: what it is at the start. W (out, in) or None: the weight it stands for, towards
    which latents lean. `state()` gives the packed tensors, as many bytes as at the start.
    """

    def __init__(self, level: Level, state: State, shape: Shape, W: Tensor | None) -> None:
        self.level, self.shape = level, shape
        self.start = state
        self._parts: list[_Codes | _Floats] = []
        left = W
        for part, params, tensors, suffix in compose.terms(level, state):
            if isinstance(part, (CodedMethod, SparseMethod)) and "codes" in tensors:
                codes = _Codes(part, tensors, shape, params, suffix)
                codes.lean(left)
                made: _Codes | _Floats = codes
            else:
                made = _Floats(part, tensors, shape, params, suffix)
            self._parts.append(made)
            if left is not None:
                left = left - part.decompress(tensors, shape, torch.float32, **params)

    def latents(self) -> Iterator[Tensor]:
        """Yield the latent codes, in units of one code."""
        for part in self._parts:
            if isinstance(part, _Codes):
                yield part.latent

    def floats(self) -> Iterator[Tensor]:
        """Yield logarithms of scale changes, and relative changes of other floats: near 0."""
        for part in self._parts:
            yield from part.floats()

    def moves(self) -> Iterator[Tensor]:
        """Yield how far zero points have moved, in units of one code."""
        for part in self._parts:
            if isinstance(part, _Codes):
                yield from part.moves()

    def weight(self) -> Tensor:
        """Return the weight (out, in) float32 with its graph."""
        total = self._parts[0].weight()
        for part in self._parts[1:]:
            total = total + part.weight()
        return total

    @torch.no_grad()
    def state(self) -> State:
        """Return the packed tensors of the weight as it is now."""
        made: State = {}
        for part in self._parts:
            made |= {f"{name}{part.suffix}": tensor for name, tensor in part.state().items()}
        return {name: made[name] for name in self.start}

    def bound(self) -> None:
        """Bring latents and zero points that went beyond the first or last code back to it."""
        for part in self._parts:
            if isinstance(part, _Codes):
                part.bound()


class _Codes:
    """Latent codes, scales and zero points of a term; of a sparse one, of the weights it keeps."""

    def __init__(
        self, part: Any, state: State, shape: Shape, params: Mapping[str, Any], suffix: str
    ) -> None:
        self.part, self.params, self.suffix, self.shape = part, params, suffix, shape
        self.maxq = float(2 ** params["bits"] - 1)
        self.dtype = state["scales"].dtype
        scale, zero = unpack_grid(state, shape, **params)
        self.scale, self.zero = scale.squeeze(-1).float(), zero.squeeze(-1).float()
        self.mask: Tensor | None = None
        if isinstance(part, SparseMethod):
            mask, q = unpack_sparse(state, shape, **params)
            self.mask = self._grouped(mask)
        else:
            q = unpack(state["codes"], params["bits"], shape[1])
        self.latent: Tensor = self._grouped(q).float()
        self.change = nn.Parameter(torch.zeros_like(self.scale))
        self.move = nn.Parameter(torch.zeros_like(self.zero), not params["symmetric"])

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.scale.shape[1], -1))

    def lean(self, W: Tensor | None) -> None:
        """Let the latents begin between their codes and W (out, in), the weight they stand for."""
        if W is not None:
            wish = self._grouped(W) / self.scale[..., None] + self.zero[..., None]
            self.latent = self.latent + (wish - self.latent).clamp(-LEAN, LEAN)
        self.latent = nn.Parameter(self.latent)

    def floats(self) -> Iterator[Tensor]:
        yield self.change

    def moves(self) -> Iterator[Tensor]:
        if self.move.requires_grad:
            yield self.move

    def bound(self) -> None:
        with torch.no_grad():
            low, high = -self.zero, self.maxq - self.zero  # a zero point is one of the codes
            self.move.copy_(self.move.clamp(low - LEAN, high + LEAN))
            shift = self._shift()[..., None]
            self.latent.copy_(self.latent.clamp(-LEAN - shift, self.maxq + LEAN - shift))

    def _shift(self) -> Tensor:
        return torch.minimum(torch.maximum(self.move.round(), -self.zero), self.maxq - self.zero)

    def _scale(self) -> Tensor:
        scale = self.scale * self.change.exp()
        return scale + (round_scale(scale.detach(), self.dtype) - scale).detach()

    def weight(self) -> Tensor:
        made = _Rounded.apply(
            self.latent, self._scale(), self.zero, self.move, self._shift().detach(), self.maxq
        )
        made = made if self.mask is None else made * self.mask
        return made.view(self.shape)

    @torch.no_grad()
    def state(self) -> State:
        shift = self._shift()
        q = (self.latent.round() + shift[..., None]).clamp(0.0, self.maxq).view(self.shape)
        grid = self._scale(), self.zero + shift
        if self.mask is None:
            return pack_state(q, *grid, **self.params)
        return pack_sparse(self.mask.view(self.shape), q, grid, **self.params)


class _Rounded(torch.autograd.Function):
    """(code - zero point) * scale with code = round(latent) + shift inside 0 .. maxq.

    The gradient passes the rounding unchanged. A zero point that moves takes the codes with it,
    so that only weights at an end of the range see it: those have its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scale: Tensor,
        zero: Tensor,
        move: Tensor,
        shift: Tensor,
        maxq: float,
    ) -> Tensor:
        here = latent + shift[..., None] if shift.any() else latent
        levels = here.round().clamp_(0.0, maxq).sub_((zero + shift)[..., None])
        ends = ((here < -CLIPPED) | (here > maxq + CLIPPED)) if move.requires_grad else None
        ctx.save_for_backward(levels, scale, ends)
        return levels * scale[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        levels, scale, ends = ctx.saved_tensors
        (gradient,) = gradients
        moved = None if ends is None else -(gradient * ends).sum(-1) * scale
        by_latent = gradient * scale[..., None]
        return by_latent, (gradient * levels).sum(-1), None, moved, None, None


class _Floats:
    """A term without codes of its own: its floating-point tensors are tuned as they are."""

    def __init__(
        self, part: Any, state: State, shape: Shape, params: Mapping[str, Any], suffix: str
    ) -> None:
        self.part, self.suffix, self.shape, self.params = part, suffix, shape, params
        self.fixed = dict(state)
        self.size: dict[str, Tensor] = {}
        self.change: dict[str, Tensor] = {}
        if part.is_trainable and part.name != "dense":
            for name, tensor in state.items():
                if tensor.is_floating_point() and name != "bias_fix":
                    rms = tensor.float().square().mean().sqrt()
                    self.size[name] = rms.clamp(min=torch.finfo(torch.float32).tiny)
                    self.change[name] = nn.Parameter(torch.zeros(tensor.shape))

    def floats(self) -> Iterator[Tensor]:
        yield from self.change.values()

    def _now(self) -> State:
        now = dict(self.fixed)
        for name, change in self.change.items():
            stored = self.fixed[name]
            value = stored.float() + self.size[name] * change
            now[name] = value + (value.detach().to(stored.dtype).float() - value).detach()
        return now

    def weight(self) -> Tensor:
        return self.part.decompress(self._now(), self.shape, torch.float32, **self.params)

    def state(self) -> State:
        return {name: x.detach().to(self.fixed[name].dtype) for name, x in self._now().items()}
