"""Mixtures of compressed experts, computed at once instead of one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.experts import SplitExperts, between
from ..plans.level import DENSE
from .kernels.experts import BETWEEN, Part, multiply, spans, stored_as
from .kernels.layer import DTYPES, Kernel
from .kernels.tracing import has_tangents, is_exporting, is_traced
from .packed import PackedWeight, tensors_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def group_experts(model: nn.Module, *, by_kernels: bool) -> None:
    """Let the mixtures of `model` compute their compressed experts at once, or one by one."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            module.together = together if by_kernels else None


def together(
    experts: SplitExperts, hidden: Tensor, expert_of: Tensor, weight_of: Tensor
) -> Tensor | None:
    """Return what SplitExperts.forward does, or None where that has to be done one by one.

    The latter: adapters or hooks on experts, packed tensors that are trained, and graphs for
    others, who have no kernels.
    """
    layers = _layers(experts)
    if layers is None or hidden.dtype not in DTYPES or is_exporting():
        return None
    if not hidden.numel() or has_tangents():
        return None
    if torch.is_grad_enabled() and any(_is_trained(m) for own in layers for m in own):
        return None
    order = expert_of.reshape(-1).argsort(stable=True)
    expert, token = expert_of.reshape(-1)[order], order // expert_of.shape[-1]
    x = hidden[token]
    packed = (m for own in layers for m in own if isinstance(m, PackedWeight))
    runtime = next((m.kernels for m in packed), Kernel.runtime)
    for i, own in enumerate(layers):
        x = _linear(own, x if i == 0 else between(experts.shell, x), expert, runtime)
    answer = x * weight_of.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add_(0, token, answer.to(hidden.dtype))


def _layers(experts: SplitExperts) -> list[list[Any]] | None:
    """Return the first layers of all experts, and the last; None unless nothing is around them."""
    found: list[list[Any]] = [[], []]
    for expert in experts.children():
        if _is_watched(expert):
            return None
        for own, name in zip(found, _names(expert), strict=True):
            layer = expert._modules[name]
            is_known = (type(layer) is nn.Linear and "weight" in tensors_of(layer)) or (
                isinstance(layer, PackedWeight) and layer.computes_by_kernel
            )
            if not is_known or _is_watched(layer):
                return None
            own.append(layer)
    for own in found:
        if len({layer.bias is None for layer in own}) > 1:
            return None
    return found


def _names(expert: Any) -> tuple[str, str]:
    return expert.names  # type: ignore[no-any-return]


def _is_watched(module: Any) -> bool:
    """Return whether something waits for calls of a module, or has put itself in their place."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def _is_trained(layer: Any) -> bool:
    return any(p is not None and p.requires_grad for p in tensors_of(layer).values())


def _linear(layers: list[Any], x: Tensor, expert: Tensor, runtime: str) -> Tensor:
    """Return x (tokens, in) times the weights of the layers that `expert` numbers, plus biases."""
    if torch.is_autocast_enabled(kind := x.device.type):
        with torch.autocast(kind, enabled=False):
            return _linear(layers, x.to(torch.get_autocast_dtype(kind)), expert, runtime)
    has_graph = torch.is_grad_enabled() and x.requires_grad
    shape = (layers[0].out_features, layers[0].in_features)
    is_plain = x.is_cpu and runtime == Kernel.runtime
    if is_plain and not (has_graph or type(x) is not Tensor or is_traced()):
        parts = []
        for e, first, last in spans(expert, len(layers)):
            own = layers[e]
            stored = stored_as(_text(own), shape, runtime)
            parts.append(Part(stored, tensors_of(own), own.bias, first, last))
        with torch.no_grad():
            return multiply(x, parts, shape[0])
    texts = [_text(layer) for layer in layers]
    levels = list(dict.fromkeys(texts))
    state = [getattr(layer, name) for layer in layers for name in _tensors(layer)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    which = [levels.index(text) for text in texts]
    how = BETWEEN.join(levels), which, shape[0], runtime
    return torch.ops.evopress.experts(x, expert, state, biases, *how)  # type: ignore[no-any-return]


def _tensors(layer: Any) -> tuple[str, ...]:
    return layer._state_names if isinstance(layer, PackedWeight) else ("weight",)


def _text(layer: Any) -> str:
    return layer.level_text if isinstance(layer, PackedWeight) else str(DENSE)
