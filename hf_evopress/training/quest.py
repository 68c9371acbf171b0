"""Quantisation-aware training by QuEST: rotated weights, a trusted gradient, rotated codes out.

    make_quest(model, bits=3)                    # a dense model, trained as any other
    DistillationTrainer(model, args, train_dataset=data, teacher=dense).train()
    to_rotated(model)                            # packed: `hadamard:bits=3` in every layer
    model.save_pretrained("small")

Panferov et al. 2025 (arXiv:2502.05003). A layer computes with the weight that
`hadamard:bits=b` would store, Q^T round(Q W); the gradient reaches W through the rotation, where
it is trusted (`methods/maths/quest.py`). What is exported is what the last step computed with.

With activation_bits the inputs are rotated and rounded too, per token. Our levels store weights:
an exported model computes with activations as they are, which loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.layers import CompressedLinear
from ..loading.quantizer import attach
from ..loading.stitch import compress_model
from ..methods import compose
from ..methods.maths.codes import SCALE_DTYPES
from ..methods.maths.quest import CLIP, RotatedRows, Trusted, step_of_rows
from ..models.units import find_units
from ..plans.level import Level
from ..plans.plan import Plan


class QuESTLinear(nn.Linear):
    """A linear layer that computes with its weight as `level` rounds it, and trains the weight.

    `weight` is the unrounded one: a checkpoint of Trainer is that of the dense model.
    """

    def __init__(self, linear: nn.Linear, level: Level, activation_bits: int | None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.level, self.activation_bits = level, activation_bits
        _, self.params, _ = next(compose.parts(level))
        self.train(linear.training)

    def rotated_weight(self) -> Tensor:
        """Return round(Q W), (out, in) float32."""
        seed, block = self.params["seed"], self.params["block"]
        Y = RotatedRows.apply(self.weight.float(), seed, block, False)
        dtype = SCALE_DTYPES[self.params["scales"]]
        step = step_of_rows(Y.detach(), self.params["bits"], dtype)
        made: Tensor = Trusted.apply(Y, step, self.params["bits"])
        return made

    def forward(self, input: Tensor) -> Tensor:
        Y, seed, block = self.rotated_weight(), self.params["seed"], self.params["block"]
        if self.activation_bits is None:
            W = RotatedRows.apply(Y, seed, block, True)
            return F.linear(input, W.to(input.dtype), self.bias)
        x = RotatedRows.apply(input, seed, block, False)
        step = step_of_rows(x.detach(), self.activation_bits)
        x = Trusted.apply(x, step, self.activation_bits)
        return F.linear(x.to(input.dtype), Y.to(input.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, level='{self.level}', activations={self.activation_bits}"


def make_quest(
    model: Any,
    bits: int = 4,
    *,
    block: int = 64,
    activation_bits: int | None = None,
    skip: Sequence[str] = (),
) -> list[str]:
    """Return the names of the linear layers that train as `hadamard:bits=...` from now on.

    Those of the decoder blocks, without `skip` (patterns). activation_bits: of their inputs in
    training, None for floats.
    """
    level = compose.normalize(f"hadamard:bits={bits},block={block}")
    if activation_bits is not None and activation_bits not in CLIP:
        raise ValueError(
            f"activations have {', '.join(map(str, CLIP))} bits, or None; got {activation_bits}"
        )
    units = find_units(model, skip=skip)
    for unit in units:
        layer = model.get_submodule(unit.name)
        if isinstance(layer, CompressedLinear):
            raise ValueError(
                f"{unit.name} is at level '{layer.level}': QuEST trains a dense model, which "
                "dequantize() gives"
            )
        compose.check_shape(level, unit.shape)
    for unit in units:
        layer = model.get_submodule(unit.name)
        model.set_submodule(unit.name, QuESTLinear(layer, level, activation_bits))
    return [unit.name for unit in units]


@torch.no_grad()
def to_rotated(model: Any) -> Plan:
    """Return the plan of `model` after packing, in place, each layer that QuEST trains."""
    trained = {n: m for n, m in model.named_modules() if isinstance(m, QuESTLinear)}
    if not trained:
        raise ValueError("no layer is trained by QuEST: call make_quest(model) first")
    plan = Plan(
        {name: layer.level for name, layer in trained.items()},
        shapes={n: (layer.out_features, layer.in_features) for n, layer in trained.items()},
        base_model=getattr(model.config, "_name_or_path", None) or None,
    )
    compress_model(model, plan, None)
    attach(model, plan)
    return plan
