"""Put packed modules in the place of dense ones, and dense ones back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..methods.base import State
from ..models.ends import ends_of, output_head
from ..plans.level import Level
from ..plans.plan import Plan
from .embedding import CompressedEmbedding, compress_embedding, tie_head, untie_packed
from .layers import CompressedLinear, compress_linear, compressed_layers, resolve_units
from .neighbours import forget, share
from .packed import PackedWeight
from .resize import let_resize


def replace_linears(
    model: nn.Module, plan: Plan, states: Callable[[str, Level], State]
) -> list[str]:
    """Put a packed module in the place of everything that `plan` does not leave dense.

    `states(unit, level)` returns the packed tensors; it is called unit by unit, so that one
    dense weight at a time need exist beside the packed ones. Returns the module paths replaced.
    """
    names = resolve_units(model, plan)
    replaced = []
    for unit, level in plan.items():
        if level.is_dense or level.is_drop or unit not in names:
            continue
        replace(model, names[unit], level, states(unit, level))
        replaced.append(names[unit])
    share(model, compressed_layers(model))
    return replaced


def replace(model: Any, path: str, level: Level, state: State | None = None) -> None:
    """Put a packed module in the place of the linear layer or embedding at `path`.

    Without a `state` its packed tensors are on the meta device, ready to be loaded. Where the
    head has the embedding's weight, it is replaced as well.
    """
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        is_shared = any(end.name == path and end.role == "tied" for end in ends_of(model))
        model.set_submodule(path, compress_embedding(module, level, state))
        if is_shared:
            head = output_head(model)
            assert head is not None  # it shares the weight
            tie_head(model, path, head[0])
            _keep_hook(model, head[0], head[1])
    elif state is None:
        shape = (module.out_features, module.in_features)
        layer = CompressedLinear.empty(level, shape, module.bias, dtype=module.weight.dtype)
        model.set_submodule(path, layer)
    else:
        assert isinstance(module, nn.Linear)  # resolve_units returns nothing else
        model.set_submodule(path, compress_linear(module, level, state))
    _keep_hook(model, path, module)


def _keep_hook(model: Any, path: str, before: nn.Module) -> None:
    """Let accelerate move the inputs of a module as it did those of the one before."""
    if (hook := getattr(before, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(model.get_submodule(path), hook)


def restore_linears(model: Any) -> None:
    """Put a stock module with the same weight in the place of every packed one."""
    forget(model, compressed_layers(model))
    _restore(model, compressed_layers(model))


def _make_ends_dense(model: Any) -> None:
    _restore(model, _packed_ends(model))


def _restore(model: Any, layers: Mapping[str, Any]) -> None:
    """Put stock modules in the place of some packed ones, and of a head that shares tensors."""
    head = _tied_head(model)
    for name, layer in layers.items():
        assert isinstance(layer, (CompressedLinear, CompressedEmbedding))
        model.set_submodule(name, layer.dequantize())
    _restore_head(model, head)


def _packed_ends(model: Any) -> dict[str, PackedWeight]:
    """Return module path -> packed embedding and packed head, the latter where it is by itself."""
    head = output_head(model)
    ends = [model.get_input_embeddings(), head[1] if head is not None else None]
    return {n: m for n, m in compressed_layers(model).items() if any(m is end for end in ends)}


def blank_linears(model: Any) -> dict[str, PackedWeight]:
    """Put stock modules, whose weights are for others to fill, in the place of packed ones.

    Returns what was there, by name.
    """
    head, taken = _tied_head(model), compressed_layers(model)
    for name, layer in taken.items():
        assert isinstance(layer, (CompressedLinear, CompressedEmbedding))
        device = next(iter(layer.state.values())).device
        W = torch.empty(layer.shape, dtype=layer.weight_dtype, device=device)
        model.set_submodule(name, layer.stock(W))
    _restore_head(model, head)
    return taken


def _tied_head(model: Any) -> tuple[str, Any] | None:
    head = output_head(model)
    return head if head is not None and getattr(head[1], "is_tied", False) else None


def _restore_head(model: Any, head: tuple[str, Any] | None) -> None:
    """Put a stock head with the embedding's weight in the place of one that shared its tensors."""
    if head is None:
        return
    path, packed = head
    stock = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")
    stock.weight, stock.bias = model.get_input_embeddings().weight, packed.bias
    model.set_submodule(path, stock.train(packed.training))
    untie_packed(model)


let_resize(_make_ends_dense)
