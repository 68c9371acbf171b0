"""Convert a model to plain form, every matrix an nn.Linear of its own, and back to stock form.

transformers keeps some in other forms: experts as one tensor (see `experts`), the layers of GPT-2
as Conv1D, which stores a weight transposed, those of Falcon in a subclass of nn.Linear. Levels,
statistics and adapters are of plain layers; checkpoints of others are read and written in the
stock form. The names of layers are the same in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..plans.plan import Plan
from .experts import fuse_experts, match_experts, own_parameter, split_experts

_LIKE_LINEAR = ("FalconLinear",)  # what they compute is what nn.Linear does
_STOCK = "_stock_linears"  # of a model in plain form: path -> the class that the layer had


def make_plain(model: nn.Module) -> None:
    """Bring `model` into the plain form; one layer at a time is in memory twice."""
    split_experts(model)
    _make_linear(model)


def make_stock(model: nn.Module) -> bool:
    """Bring `model`, all dense, back into its stock form; return whether anything was changed."""
    was_split = bool(fuse_experts(model))
    return _restore(model) or was_split


def match_plan(model: nn.Module, plan: Plan) -> None:
    """Bring the layers that `plan` may have units among into the plain form, others to stock."""
    match_experts(model, plan)
    paths = [*stock_linears(model), *model.__dict__.get(_STOCK, {})]
    # a plan may name units with the prefix of the base model or without
    paths = [f".{path}" for path in paths]
    if any(p.endswith(f".{u}") or f".{u}".endswith(p) for u in plan for p in paths):
        _make_linear(model)
    else:
        _restore(model)


def _restore(model: nn.Module) -> bool:
    stock: dict[str, type] = model.__dict__.pop(_STOCK, {})
    for path, kind in stock.items():
        linear = model.get_submodule(path)
        if type(linear) is nn.Linear:  # what was dropped in between is stock again already
            model.set_submodule(path, _of_kind(kind, linear))
    return bool(stock)


def _make_linear(model: nn.Module) -> None:
    found = stock_linears(model)
    for path, module in found.items():
        model.set_submodule(path, _linear(module))
    if found:
        known = model.__dict__.setdefault(_STOCK, {})
        known |= {path: type(module) for path, module in found.items()}


def stock_class(model: nn.Module, path: str) -> type[nn.Module]:
    """Return the class that the layer at `path` has in the stock form of `model`."""
    known: dict[str, type[nn.Module]] = model.__dict__.get(_STOCK, {})
    return known.get(path) or type(model.get_submodule(path))


def stock_linears(model: nn.Module) -> dict[str, Any]:
    """Return the layers that are in another form than nn.Linear, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Conv1D) or type(module).__name__ in _LIKE_LINEAR
    }


def shape_of(linear: Any) -> tuple[int, int]:
    """Return (out, in) of a layer, a Conv1D too."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


@torch.no_grad()
def _linear(module: Any) -> nn.Linear:
    is_transposed = isinstance(module, Conv1D)
    W = own_parameter(module.weight, is_transposed=True) if is_transposed else module.weight
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = W, module.bias
    return linear.train(module.training)


@torch.no_grad()
def _of_kind(kind: Any, linear: Any) -> nn.Module:
    rows, columns = linear.weight.shape
    with torch.device("meta"):
        module = Conv1D(rows, columns) if kind is Conv1D else kind(columns, rows, bias=False)
    W = own_parameter(linear.weight, is_transposed=True) if kind is Conv1D else linear.weight
    module.weight, module.bias = W, linear.bias
    return module.train(linear.training)
