"""Mixtures of experts split into one linear layer per expert, and fused again.

transformers keeps the experts of a block in tensors of three dimensions, (experts, out, in).
Whatever this package compresses is an nn.Linear, so that statistics, levels and adapters are per
expert. `split_experts` puts SplitExperts in the place of the fused modules: units are then called
`model.layers.0.mlp.experts.7.down_proj`. `fuse_experts` undoes it, for stock checkpoints.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..plans.plan import Plan

logger = logging.getLogger(__name__)

_OF_EXPERT = re.compile(r"(.*experts)\.(?:expert_)?\d+\.(\w+)")  # expert_ of Switch and NLLB
# (experts, hidden, expert_of, weight_of) -> what forward() returns, or None if it cannot do this
Together: TypeAlias = "Callable[[SplitExperts, Tensor, Tensor, Tensor], Tensor | None]"
# What transformers.integrations.use_experts_implementation, the decorator of such modules, sets.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


class SplitExperts(nn.ModuleList):
    """The experts of one block: as a list, and as the module that a router sends tokens to."""

    def __init__(self, fused: nn.Module) -> None:
        names = _names(fused)
        n_experts = fused.get_parameter(names[0]).shape[0]
        super().__init__(_Expert(fused, names, e) for e in range(n_experts))
        shell = copy.copy(fused)  # without weights: for its gate, and to be filled again
        shell._parameters = dict.fromkeys(fused._parameters)
        self._shell = (shell,)  # in a tuple, as it is no part of the model now
        self.together: Together | None = None  # a way to compute all experts at once

    @property
    def shell(self) -> Any:
        """The fused module, without weights."""
        return self._shell[0]

    def forward(self, hidden: Tensor, expert_of: Tensor, weight_of: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts say, (tokens, dim).

        hidden (tokens, dim); expert_of and weight_of (tokens, top_k).
        """
        if self.together is not None:
            answer = self.together(self, hidden, expert_of, weight_of)
            if answer is not None:
                return answer
        total = torch.zeros_like(hidden)
        if torch.compiler.is_exporting():  # which experts have tokens is not known
            for e, expert in enumerate(self):
                share = (weight_of * (expert_of == e)).sum(-1, keepdim=True)
                total = total + (expert(hidden, self.shell) * share).to(total.dtype)
            return total
        for e in expert_of.unique().tolist():
            if e >= len(self):  # masked
                continue
            token, k = torch.where(expert_of == e)
            answer = self[e](hidden[token], self.shell) * weight_of[token, k, None]
            total.index_add_(0, token, answer.to(total.dtype))
        return total


class _Expert(nn.Module):
    """One expert; `names` are those of its two layers, the first one's outputs go to the last."""

    def __init__(self, fused: nn.Module, names: tuple[str, str], e: int) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, _linear(fused, name, e))

    def forward(self, x: Tensor, shell: Any) -> Tensor:
        first, last = (self.get_submodule(name) for name in self.names)
        return last(between(shell, first(x)))


def between(shell: Any, x: Tensor) -> Tensor:
    """Return what the last layer of an expert gets for what the first has made, row by row."""
    return shell._apply_gate(x) if shell.has_gate else shell.act_fn(x)  # type: ignore[no-any-return]


def split_experts(model: nn.Module) -> list[str]:
    """Put SplitExperts in the place of all fused experts of `model`; return their paths.

    The weights are copied one module at a time: no more memory but for one module's.
    """
    found = list(_fused(model))
    for path, fused in found:
        model.set_submodule(path, SplitExperts(fused))
        fused._parameters.clear()
    return [path for path, _ in found]


@torch.no_grad()
def fuse_experts(model: nn.Module) -> list[str]:
    """Undo split_experts; every expert has to be dense. Return the paths."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, SplitExperts)]
    for path, experts in found:
        shell = experts.shell
        for name in _names(shell):
            linears: list[Any] = [expert.get_submodule(name) for expert in experts]
            weight = torch.stack([linear.weight for linear in linears])
            if shell.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            shell._parameters[name] = nn.Parameter(weight, requires_grad=False)
            if shell.has_bias:
                biases = torch.stack([linear.bias for linear in linears])
                shell._parameters[f"{name}_bias"] = nn.Parameter(biases, requires_grad=False)
        model.set_submodule(path, shell)
    if found:  # save_pretrained takes the stock names again
        model.__dict__.pop("_weight_conversions", None)
    return [path for path, _ in found]


def match_experts(model: nn.Module, plan: Plan) -> None:
    """Split the experts of `model` if `plan` has units among them, and fuse them if not."""
    modules = dict(model.named_modules())
    paths = [n for n, m in modules.items() if isinstance(m, SplitExperts)]
    paths += [path for path, _ in _fused(model)]
    ends = tuple(f"{path.rpartition('.layers.')[2]}." for path in paths)
    if any(end in unit for unit in plan for end in ends):
        split_experts(model)
    else:
        fuse_experts(model)


def warn_of_experts(model: nn.Module) -> None:
    """Say what stays dense: experts in a form of their own, once those that can be are split."""
    fused = {  # a convolution has three dimensions too
        f"{path}.{n}": p.numel()
        for path, module in model.named_modules()
        for n, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1 and not isinstance(module, nn.Conv1d)
    }
    if fused:
        logger.warning(
            "%d tensors of fused experts (%s), %.0f %% of the model, are in a form that cannot be "
            "split into linear layers: they stay dense, and bits per weight do not count them",
            len(fused),
            ", ".join([*fused][:2]) + (", ..." if len(fused) > 2 else ""),
            100 * sum(fused.values()) / sum(p.numel() for p in model.parameters()),
        )


def others(name: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that are the same layer as `name` in other experts of its block."""
    match = _OF_EXPERT.fullmatch(name)
    if match is None:
        return []
    return [
        other
        for other in names
        if (m := _OF_EXPERT.fullmatch(other)) and other != name and m.groups() == match.groups()
    ]


def _fused(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if not all(hasattr(module, flag) for flag in _FLAGS):
            continue
        has_norm = getattr(module, "has_post_expert_norm", False)
        weights = [module._parameters.get(name) for name in _names(module)]
        if not has_norm and all(w is not None and w.is_floating_point() for w in weights):
            yield path, module


def _names(fused: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")


@torch.no_grad()
def _linear(fused: Any, name: str, e: int) -> nn.Linear:
    weight = own_parameter(fused.get_parameter(name), e, is_transposed=fused.is_transposed)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    if fused.has_bias:
        linear.bias = own_parameter(fused.get_parameter(f"{name}_bias"), e)
    return linear.train(fused.training)


def own_parameter(
    parameter: nn.Parameter, e: int | None = None, *, is_transposed: bool = False
) -> nn.Parameter:
    """Return `parameter`, or its part e, as one that shares no memory with it."""
    part = parameter if e is None else parameter[e]
    part = part.T if is_transposed else part
    own = nn.Parameter(part.clone(memory_format=torch.contiguous_format), parameter.requires_grad)
    if getattr(parameter, "_is_hf_initialized", False):  # it came from a checkpoint
        own._is_hf_initialized = True  # type: ignore[attr-defined]
    return own
