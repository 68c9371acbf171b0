"""Layers whose codes are trained with the whole model: latent codes behind a rounding.

While a model is distilled, a LatentLinear stands in for each compressed layer: its weight is made
of latent codes, scales, zero points and other floats (`rounding`), all of which have gradients.
`settle` packs what they have become into the compressed layer, which takes its place again.
Straight-through rounding of all codes at once is the discrete half of what PV-Tuning (Malinovskii
et al. 2024, arXiv:2405.14852) alternates; here a step moves a latent by a small part of a code, so
that few codes change in any one step.
"""

from __future__ import annotations

from collections.abc import Mapping
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
CODE_STEPS, ZERO_STEPS, FLOAT_STEPS = 100.0, 100.0, 20.0


class LatentLinear(nn.Module):
    """x (..., in) -> (..., out) by latent codes, which lean towards W (out, in) if it is known."""

    def __init__(self, layer: CompressedLinear, W: Tensor | None) -> None:
        super().__init__()
        self._held = (layer,)  # not a child: its packed tensors are neither trained nor saved
        self.tuned = TunedLevel(layer.level, layer.state, layer.shape, W)
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


def make_latent(model: nn.Module, dense: Mapping[str, Tensor] | None = None) -> list[str]:
    """Return the names of the layers that were replaced by LatentLinears.

    dense: name of a layer -> its dense weight (out, in).
    """
    names = []
    for name, layer in compressed_linears(model).items():
        if any(key.partition("_")[0] == "codes" for key in layer.state):
            W = None if dense is None else dense[name].float()
            model.set_submodule(name, LatentLinear(layer, W))
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


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return the groups of an optimizer, each with the step that suits its kind."""
    layers = latent_linears(model).values()
    kinds = [
        (CODE_STEPS, [p for layer in layers for p in layer.latents]),
        (ZERO_STEPS, [p for layer in layers for p in layer.zeros]),
        (FLOAT_STEPS, [p for layer in layers for p in layer.floats]),
    ]
    known = {id(p) for _, of in kinds for p in of}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    return [{"params": of, "lr": rate * times} for times, of in [*kinds, (1.0, others)] if of]


class KeepInRange(TrainerCallback):
    """Brings latents that left the range of their codes back to it, after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in latent_linears(self.model).values():
            with torch.no_grad():
                layer.tuned.bound()
