"""Learned rounding: codes, scales and factors of a block tuned on the block's own output.

A code is a latent number that is rounded on the way in; its gradient passes the rounding
unchanged. Signs of gradients move the latents, so that the step size says how many codes may
change at all, as in SignRound (Cheng et al. 2023, arXiv:2309.05516). There a latent starts at the
weight in units of its scale; here at the code that GPTQ chose, leaning towards the weight it was
made from. Zero points stay; scales are rounded to the dtype they are stored in at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from . import compose
from .codes import CodedMethod, n_groups, pack_state
from .grid import round_scale
from .level import Level
from .methods.base import Shape, State
from .packing import unpack

LEAN = 0.45  # how far a latent may start from its code, in codes; 0.5 is where the next begins


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
            if isinstance(part, CodedMethod):
                made: _Codes | _Floats = _Codes(tensors, shape, params, suffix, left)
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
        """Bring latents that went beyond the first or last code back to it."""
        for part in self._parts:
            if isinstance(part, _Codes):
                with torch.no_grad():
                    part.latent.clamp_(-LEAN, part.maxq + LEAN)


class _Codes:
    def __init__(
        self, state: State, shape: Shape, params: Mapping[str, Any], suffix: str, W: Tensor | None
    ) -> None:
        self.params, self.suffix, self.shape = params, suffix, shape
        rows, groups = shape[0], n_groups(shape, params["group_size"])
        self.maxq = float(2 ** params["bits"] - 1)
        self.dtype = state["scales"].dtype
        self.scale = state["scales"].float()
        if params["symmetric"]:
            self.zero = torch.full_like(self.scale, 2 ** (params["bits"] - 1))
        else:
            self.zero = unpack(state["zeros"], params["bits"], rows * groups).view(rows, -1).float()
        q = unpack(state["codes"], params["bits"], shape[1]).view(rows, groups, -1).float()
        if W is not None:
            wish = W.view(rows, groups, -1) / self.scale[..., None] + self.zero[..., None]
            q = q + (wish - q).clamp(-LEAN, LEAN)
        self.latent = q.requires_grad_()
        self.change = torch.zeros_like(self.scale, requires_grad=True)

    def floats(self) -> Iterator[Tensor]:
        yield self.change

    def _scale(self) -> Tensor:
        scale = self.scale * self.change.exp()
        return scale + (round_scale(scale.detach(), self.dtype) - scale).detach()

    def weight(self) -> Tensor:
        made = _Rounded.apply(self.latent, self._scale(), self.zero, self.maxq)
        return made.view(self.shape)

    def state(self) -> State:
        q = self.latent.round().clamp(0.0, self.maxq).view(self.shape)
        return pack_state(q, self._scale(), self.zero, **self.params)


class _Rounded(torch.autograd.Function):
    """(round(latent) - zero) * scale; the gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero: Tensor, maxq: float) -> Tensor:
        levels = latent.round().clamp_(0.0, maxq).sub_(zero[..., None])
        ctx.save_for_backward(levels, scale)
        return levels * scale[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        levels, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * scale[..., None], (gradient * levels).sum(-1), None, None


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
                    self.change[name] = torch.zeros(tensor.shape, requires_grad=True)

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
