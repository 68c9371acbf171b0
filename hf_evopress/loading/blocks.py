"""Models of many sizes: load the first blocks only, shed or add some while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base.resources import format_size, parse_size
from ..methods import compose
from ..methods.base import State
from ..plans.block_order import METHOD, order_of, prefix, with_blocks
from ..plans.level import Level
from ..plans.plan import Plan
from ..store.checksums import checksum
from .layers import CompressedLinear, compressed_layers, resolve_units


@dataclass(frozen=True)
class Stack:
    """The checkpoint that blocks come from: its plan, safetensors files and checksums.

    names: what tensors of the files are called in the model, where that differs.
    """

    plan: Plan
    files: tuple[str, ...] = ()
    checksums: Mapping[str, str] | None = None
    names: Mapping[str, str] = field(default_factory=dict)


def resize(model: Any, size: str | int) -> Any:
    """Return `model` after it shed or added blocks, so that its tensors take at most `size` bytes.

    Blocks go and come in the order of the checkpoint, those that are worth least per byte first
    to go. They are read from the files that the model was loaded from, and only those that are
    missing. A model that was saved smaller has no more to add.

    >>> model = AutoModelForCausalLM.from_pretrained("me/stack")        # doctest: +SKIP
    >>> model.resize("60MB")            # or hf_evopress.resize(model, ...)   # doctest: +SKIP
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    config: Any = getattr(quantizer, "quantization_config", None)
    if not isinstance(getattr(config, "plan", None), Plan):
        raise ValueError("resize() takes a compressed model of many sizes; this one is not packed")
    stack = getattr(quantizer, "stack", None) or Stack(config.plan)
    n = n_fitting(stack.plan, _other_bytes(model, config.plan), size)
    plan = prefix(stack.plan, n)
    stem = f"{model.base_model_prefix}."
    tensors = _places(stack, stem)
    set_levels(
        model, plan, lambda path, names: _read(stack, tensors, stem, path, names), config.runtime
    )
    config.plan = plan
    quantizer.stack = stack
    return model


def cut(model: Any, plan: Plan, size: str | int) -> tuple[Plan, list[str]]:
    """Let a model on the meta device have the blocks that fit into `size` bytes.

    Returns its plan and the names of the tensors that are left in the files.
    """
    smaller = prefix(plan, n_fitting(plan, _other_bytes(model, plan), size))
    left = set_levels(model, smaller, _nothing, None)
    return smaller, left


def n_fitting(plan: Plan, other_bytes: int, size: str | int) -> int:
    """Return how many blocks of the plan's order fit into `size` beside other tensors.

    Raises ValueError where not even one block of each unit does.
    """
    budget, order = parse_size(size), order_of(plan)
    sums = list(accumulate((block_bytes(plan, unit) for unit in order), initial=other_bytes))
    n, least = sum(total <= budget for total in sums) - 1, len(set(order))
    if n < least:
        raise ValueError(
            f"the model has no size of {format_size(budget)}: with one block per layer it takes "
            f"{format_size(sums[least])}, with all of them {format_size(sums[-1])}"
        )
    return n


def block_bytes(plan: Plan, unit: str) -> int:
    """Return the bytes of one block of a unit."""
    one, two = (compose.normalize(with_blocks(plan[unit], n)) for n in (1, 2))
    shape = plan.shapes[unit]
    return (compose.cost_bits(two, shape) - compose.cost_bits(one, shape)) // 8


def set_levels(
    model: nn.Module,
    plan: Plan,
    read: Callable[[str, Sequence[str]], State],
    runtime: str | None,
) -> list[str]:
    """Give the stacked layers of `model` the blocks that `plan` says; return the tensors dropped.

    read(path, names) returns tensors that a layer lacks. Nothing is changed if it raises.
    """
    layers, changes = compressed_layers(model), []
    for unit, path in resolve_units(model, plan).items():
        level = compose.normalize(plan[unit])
        layer = layers.get(path)
        if layer is None or layer.level == level or level.terms[0].method != METHOD:
            continue
        wanted, own = compose.empty(level, layer.shape, layer.weight_dtype), layer.state
        new = read(path, sorted(set(wanted) - set(own)))
        changes.append((path, layer, level, {n: own[n] if n in own else new[n] for n in wanted}))
    dropped = []
    for path, layer, level, state in changes:
        dropped += [f"{path}.{name}" for name in layer.state if name not in state]
        _hold(layer, level, state)
        if runtime is not None:
            layer.prepare(runtime)
    return dropped


def _hold(layer: Any, level: Level, state: State) -> None:
    device = next(iter(layer.state.values())).device
    for name in layer.state:
        if name not in state:
            del layer._parameters[name]
    if isinstance(layer, CompressedLinear):
        layer._forget()
    moved = {name: t if isinstance(t, nn.Parameter) else t.to(device) for name, t in state.items()}
    layer.hold(level, layer.shape, moved, layer.weight_dtype)


def _nothing(path: str, names: Sequence[str]) -> State:
    if names:
        raise ValueError(f"{path} has no {', '.join(names)}")
    return {}


def _other_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes of all tensors that are not blocks of the plan's order, tied ones once."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    return total - sum(block_bytes(plan, unit) for unit in order_of(plan))


def _places(stack: Stack, stem: str) -> dict[str, tuple[str, str]]:
    """Return the name of a tensor in the base model -> its file, and its name there.

    stem: what the names of the whole model's layers begin with, and those of its base do not.
    """
    from safetensors import safe_open

    places: dict[str, tuple[str, str]] = {}
    for file in stack.files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                places[stack.names.get(key, key).removeprefix(stem)] = file, key
    return places


def _read(
    stack: Stack,
    places: Mapping[str, tuple[str, str]],
    stem: str,
    path: str,
    names: Iterable[str],
) -> State:
    """Return tensors of the layer at `path` from the files; only their bytes are read."""
    from safetensors import safe_open

    found, missing = {}, []
    wanted: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        place = places.get(f"{path.removeprefix(stem)}.{name}")
        if place is None:
            missing.append(name)
        else:
            wanted.setdefault(place[0], []).append((name, place[1]))
    if missing:
        where = f"which are not in {', '.join(stack.files)}"
        if not stack.files:
            where = "and the model was not loaded from a checkpoint that has them"
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}, {where}")
    for file, keys in wanted.items():
        with safe_open(file, framework="pt") as opened:
            for name, key in keys:
                found[name] = opened.get_tensor(key)
                _check(key, found[name], (stack.checksums or {}).get(key))
    return found


def _check(key: str, tensor: Tensor, expected: str | None) -> None:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    if expected is not None and checksum(flat, list(tensor.shape)) != expected:
        raise ValueError(
            f"the checkpoint is damaged: {key} differs from its checksum; download it again"
        )


# At the class: a method bound to one model would keep it from being freed and pickled.
if not hasattr(PreTrainedModel, "resize"):
    PreTrainedModel.resize = resize
