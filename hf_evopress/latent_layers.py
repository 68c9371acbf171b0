"""Layers whose codes are trained with the whole model: latent codes behind a rounding.

While a model is distilled, a LatentLinear stands in for each compressed layer: its weight is made
of latent codes, scales, zero points and other floats (`rounding`), all of which have gradients.
`settle` packs what they have become into the compressed layer, which takes its place again.
Codes change where the gradient is large and stays so: a latent moves in proportion to its share
of its layer's gradient, and half a code is far for most. PV-Tuning (Malinovskii et al. 2024,
arXiv:2405.14852) limits the codes that change in a step to the same end. An optimizer that gives
all latents steps of one size, as Adam does, flips them in masses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from . import compose
from .layers import IN_TRAINING, CompressedLinear, compressed_linears
from .rounding import TunedLevel

# Steps of each kind, as multiples of the learning rate: latents and zero points count in codes,
# floats relative to their own size, norms and biases are what they are.
CODE_STEPS, FLOAT_STEPS = 100.0, 20.0
MOMENTUM = 0.9


class LatentLinear(nn.Module):
    """x (..., in) -> (..., out) by latent codes that begin in the middle of their codes.

    They do not lean towards the dense weights, as they do where one block is tuned: GPTQ moved a
    good part of the codes away from those, and all of them would change back within a few steps.
    """

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        self._held = (layer,)  # not a child: its packed tensors are neither trained nor saved
        self.tuned = TunedLevel(layer.level, layer.state, layer.shape, None)
        self.latents = nn.ParameterList(self.tuned.latents())
        self.floats = nn.ParameterList(self.tuned.floats())
        self.zeros = nn.ParameterList(self.tuned.moves())

    def forward(self, input: Tensor) -> Tensor:
        layer = self._held[0]
        fix = compose.bias_fix(layer.level, self.tuned.start)
        bias = layer.bias if fix is None else fix if layer.bias is None else layer.bias + fix
        return F.linear(input, self.tuned.weight().to(input.dtype), bias)

    def packed(self) -> CompressedLinear:
        """Return the compressed layer with what was trained."""
        layer = self._held[0]
        layer.take(self.tuned.state())
        return layer


def make_latent(model: nn.Module) -> list[str]:
    """Return the names of the layers that were replaced by LatentLinears."""
    names = []
    for name, layer in compressed_linears(model).items():
        if any(key.partition("_")[0] == "codes" for key in layer.state):
            model.set_submodule(name, LatentLinear(layer))
            names.append(name)
    setattr(model, IN_TRAINING, True)
    return names


def latent_linears(model: nn.Module) -> dict[str, LatentLinear]:
    """Return module path -> layer that is trained by its codes."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LatentLinear)}


def pack_latent(model: nn.Module) -> None:
    """Put the compressed layers back, with what was trained."""
    for name, layer in latent_linears(model).items():
        model.set_submodule(name, layer.packed())
    setattr(model, IN_TRAINING, False)


class CodesAndFloats(torch.optim.AdamW):
    """AdamW for floats; for latents, momentum over gradients of root mean square 1 per layer."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        layers = latent_linears(model).values()
        codes = [p for layer in layers for p in (*layer.latents, *layer.zeros)]
        floats = [p for layer in layers for p in layer.floats]
        known = {id(p) for p in (*codes, *floats)}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": codes, "lr": rate * CODE_STEPS, "codes": True},
            {"params": floats, "lr": rate * FLOAT_STEPS, "codes": False},
            {"params": others, "lr": rate, "codes": False},
        ]
        super().__init__([g for g in groups if g["params"]], betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        latent = [(g, p) for g in self.param_groups if g["codes"] for p in g["params"]]
        for group, p in latent:
            if p.grad is None:
                continue
            size = p.grad.square().mean().sqrt().clamp(min=torch.finfo(p.dtype).tiny)
            state = self.state[p]
            if not state:  # AdamW looks for a step in every state that it reads back
                state.update(momentum=torch.zeros_like(p), step=torch.tensor(0.0))
            state["momentum"].lerp_(p.grad / size, 1 - MOMENTUM)
            p.sub_(state["momentum"], alpha=group["lr"])
            p.grad = None  # Adam passes it over
        return super().step(closure)


class KeepInRange(TrainerCallback):
    """Brings latents that left the range of their codes back to it, after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in latent_linears(self.model).values():
            with torch.no_grad():
                layer.tuned.bound()
