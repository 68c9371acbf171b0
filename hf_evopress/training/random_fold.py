"""Training with shared values: the weights of a layer are fewer values at random places.

    make_folded(model, share=0.5)                # a dense model, trained as any other
    DistillationTrainer(model, args, train_dataset=data, teacher=dense).train()
    to_folded(model)                             # packed: `folded:share=0.5` in every layer
    model.save_pretrained("small")

STABLE-RPS (Desai and Shrivastava 2023, arXiv:2310.11611): W.flat[p] = lambda g(p) psi[f(p)], f
and g by RANDOMFOLD (`methods/maths/folding.py`); share=1 is the dense model, bit for bit. The
gradient of a value is divided by its number of uses and lambda^2, so that a step of gradient
descent moves a weight as far at any share. Adam divides a gradient by its own size, so there it
matters for the clipping of gradients alone.

The paper has one psi for the whole model, in which lambda gives each layer its size. Here each
layer has its own: lambda may be 1, and a layer is packed, stored, streamed and searched without
the others. What is given up are values that layers share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.layers import CompressedLinear
from ..loading.quantizer import attach
from ..loading.stitch import compress_model
from ..methods import compose
from ..methods.maths.folding import Unfolded, n_values, signed_mean
from ..models.units import find_units
from ..plans.level import Level
from ..plans.plan import Plan


class FoldedLinear(nn.Linear):
    """A linear layer that trains psi, and computes with the weight that it unfolds to."""

    def __init__(self, linear: nn.Linear, level: Level, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.level, self.scale = level, scale
        _, self.params, _ = next(compose.parts(level))
        W = linear.weight.detach()
        psi = signed_mean(W.flatten(), n_values(W.numel(), self.params["share"]), self.seed)
        self.psi = nn.Parameter((psi / scale).to(W.dtype), linear.weight.requires_grad)
        self.bias = linear.bias
        self.train(linear.training)

    @property
    def seed(self) -> int:
        """Of the places and signs."""
        seed: int = self.params["seed"]
        return seed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), in the dtype of psi; the gradient of psi is the paper's."""
        n = self.out_features * self.in_features
        flat: Tensor = Unfolded.apply(self.psi, n, self.seed, self.scale, True)
        return flat.view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, level='{self.level}', scale={self.scale}"


def make_folded(
    model: Any,
    share: float = 0.5,
    *,
    scale: float = 1.0,
    seed: int = 0,
    skip: Sequence[str] = (),
) -> list[str]:
    """Return the names of the linear layers that train as `folded:share=...` from now on.

    Those of the decoder blocks, without `skip` (patterns): a second call may give the skipped ones
    another share. Values start as the signed means of the weights that use them. scale: lambda of
    the module; Adam moves weights by lambda times the learning rate.
    """
    level = compose.normalize(f"folded:share={share},seed={seed}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is lambda, above 0 and finite; got scale={scale}")
    units = find_units(model, skip=skip)
    for unit in units:
        layer = model.get_submodule(unit.name)
        if isinstance(layer, CompressedLinear):
            raise ValueError(
                f"{unit.name} is at level '{layer.level}': values are shared while a dense model "
                "is trained, which dequantize() gives"
            )
        if isinstance(layer, FoldedLinear):
            raise ValueError(f"{unit.name} is folded already, as '{layer.level}': skip it")
    for unit in units:
        layer = model.get_submodule(unit.name)
        model.set_submodule(unit.name, FoldedLinear(layer, level, scale))
    return [unit.name for unit in units]


@torch.no_grad()
def to_folded(model: Any, *, values: str = "float16") -> Plan:
    """Return the plan of `model` after packing, in place, each layer that trains shared values.

    values: float16 or bfloat16, which lambda psi is rounded to.
    """
    trained = {n: m for n, m in model.named_modules() if isinstance(m, FoldedLinear)}
    if not trained:
        raise ValueError("no layer trains shared values: call make_folded(model) first")
    plan = Plan(
        {name: compose.normalize(f"{m.level},values={values}") for name, m in trained.items()},
        shapes={n: (layer.out_features, layer.in_features) for n, layer in trained.items()},
        base_model=getattr(model.config, "_name_or_path", None) or None,
    )
    compress_model(model, plan, None)
    attach(model, plan)
    return plan
