"""Train the float parameters of a packed model itself: scales, factors, norms, biases.

The codes stay as they are, so the model keeps its plan and its size. Packed floats have 16 bits,
too few for small steps, and are float32 while they are trained; `settle` rounds them back.
Norms and biases keep the model's dtype: load the model in float32 to train them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..base.plugins import did_you_mean
from ..loading.layers import CompressedLinear, compressed_linears
from ..methods import compose

KINDS = ("scales", "factors", "norms", "biases")
OF_ERROR = 1  # halvings of a level's error, 2^-bits, to what a step may change scales by
_FACTORS = ("A", "B", "P", "Q", "psi")  # lowrank, mpo, folded
_OF_DICT = ("atoms", "values")  # sparse levels have values too, which are no factors


def make_tunable(model: nn.Module, kinds: Sequence[str] = ("scales", "norms")) -> list[str]:
    """Return the names of the parameters that are trained from now on, all others are frozen.

    kinds: any of scales (of codes), factors (of low-rank and Kronecker terms, shared values, atoms
    and values of dictionaries, where they are floats), norms, biases. Call `settle` before the
    model is saved for use.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(
                f"cannot train {kind!r}{did_you_mean(kind, list(KINDS))}; known: {', '.join(KINDS)}"
            )
    model.requires_grad_(False)
    names = []
    for layer_name, layer, name in _packed_floats(model, kinds):
        value = layer.get_parameter(name).detach().float()
        layer.register_parameter(name, nn.Parameter(value, requires_grad=True))
        names.append(f"{layer_name}.{name}")
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = "norms" in kinds and "norm" in type(module).__name__.lower()
            if is_norm or ("biases" in kinds and name == "bias"):
                parameter.requires_grad_(True)
                names.append(f"{module_name}.{name}")
    if not names:
        raise ValueError(
            f"the model has no {' or '.join(kinds)} to train; its levels are "
            f"{', '.join(sorted({str(x.level) for x in compressed_linears(model).values()}))}"
        )
    return names


def rates(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Return the groups of an optimiser like Adam: the parameters that are trained, and their rate.

    A step of Adam moves every number by about its rate. Scales of 8-bit codes are so small that
    one such step would be more than the codes' error: the rate of scales is halved until, next to
    their root mean square, it is at most a half of 2^-bits.
    """
    halved: dict[int, int] = {}
    for _, layer, name in _packed_floats(model, ("scales",)):
        scales = layer.get_parameter(name)
        bits = compose.cost_bits(layer.level, layer.shape) / math.prod(layer.shape)
        most = float(scales.detach().square().mean().sqrt()) * 2.0 ** -(bits + OF_ERROR)
        is_known = lr > 0 and 0 < most < math.inf
        halved[id(scales)] = max(0, math.ceil(math.log2(lr / most))) if is_known else 0
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(halved.get(id(parameter), 0), []).append(parameter)
    return [{"params": own, "lr": lr / 2**n} for n, own in sorted(groups.items())]


def settle(model: nn.Module) -> None:
    """Round packed floats to the dtype that their level stores, and stop training them."""
    for layer in compressed_linears(model).values():
        expected = compose.empty(layer.level, layer.shape, layer.weight_dtype)
        for name, like in expected.items():
            tensor = layer.get_parameter(name).detach()
            if tensor.dtype != like.dtype:
                most = torch.finfo(like.dtype).max
                tensor = tensor.clamp(-most, most).to(like.dtype)
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    model.requires_grad_(False)


def check_trainable(model: Any) -> None:
    """Raise ValueError where no parameter of `model` would be changed by training."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "the model has no trainable parameters: add an adapter "
            "(peft.get_peft_model, or load_adapter(..., is_trainable=True)), or train its float "
            "parameters (hf_evopress.training.tunable.make_tunable)"
        )


def _packed_floats(
    model: nn.Module, kinds: Sequence[str]
) -> Iterator[tuple[str, CompressedLinear, str]]:
    for layer_name, layer in compressed_linears(model).items():
        for part, _, state, suffix in compose.terms(layer.level, layer.state):
            factors = (*_FACTORS, *_OF_DICT) if part.name == "dict" else _FACTORS
            for name, tensor in state.items():
                kind = "scales" if name.endswith(("scales", "scale")) else "factors"
                is_one = kind == "scales" or name in factors
                if is_one and kind in kinds and tensor.is_floating_point():
                    yield layer_name, layer, f"{name}{suffix}"
