"""Replace dropped attention and MLP sub-blocks by no-op modules, and restore them.

A dropped sub-block answers zeros, so that the residual stream passes by unchanged. Its stand-in
has no weights. The one for attention still writes to its layer of the key-value cache: caches
read their length from layer 0, and without that generation goes wrong without an error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..base.plugins import did_you_mean
from ..plans.level import DROP, Level
from .sub_blocks import SubBlock, find_sub_blocks, layer_idx

_READ_BY_PARENTS = (bool, int, float, str)  # types of attributes that a block may look at


class Dropped(nn.Module):
    """A sub-block without weights whose answer adds nothing.

    dense_key: the name of one weight of the original, relative to it.
    """

    def __init__(self, original: nn.Module, n_outputs: int) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if not name.startswith("_") and (
                isinstance(value, _READ_BY_PARENTS) or name == "config"
            ):
                setattr(self, name, value)
        self.n_outputs = n_outputs
        self.dense_key = _dense_key(original)
        # Bloom and MPT hand the residual to the sub-block and expect it back.
        names = list(inspect.signature(type(original).forward).parameters)[1:]
        self.residual_at = names.index("residual") if "residual" in names else None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.pop(f"{prefix}{self.dense_key}", None)  # the sentinel: not unexpected
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros like the hidden states, in the form that the block unpacks."""
        if self.residual_at is None:
            answer = torch.zeros_like(_hidden(args, kwargs))
        else:
            answer = kwargs["residual"] if "residual" in kwargs else args[self.residual_at]
        return (answer, *[None] * (self.n_outputs - 1)) if self.n_outputs else answer


class DroppedMLP(Dropped):
    """Stands in for a dropped MLP or mixture of experts."""


class DroppedAttention(Dropped):
    """Stands in for dropped attention; its layer of the cache counts tokens, as zeros."""

    def __init__(self, original: nn.Module, n_outputs: int) -> None:
        super().__init__(original, n_outputs)
        self.layer_idx = layer_idx(original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache) and self.layer_idx is not None:
                _count_tokens(value, self.layer_idx, _hidden(args, kwargs))
        return super().forward(*args, **kwargs)


def stand_in(model: nn.Module, sub: SubBlock) -> Dropped:
    """Return what replaces a sub-block of `model`, which is left as it is."""
    original = model.get_submodule(sub.name)
    kind = DroppedAttention if sub.kind == "attention" else DroppedMLP
    made = kind(original, sub.n_outputs)
    made.train(original.training)
    return made


def dropped_forward(model: nn.Module, sub: SubBlock) -> Callable[..., Any]:
    """Return a forward that, patched into the module of `sub`, makes it a dropped one."""
    return stand_in(model, sub).forward


def dropped_units(levels: Mapping[str, Level]) -> list[str]:
    """Return the units at `drop`; ValueError where units inside one of them have levels too."""
    dropped = [unit for unit, level in levels.items() if level == DROP]
    for name in dropped:
        for unit in levels:
            if unit.startswith(f"{name}."):
                raise ValueError(
                    f"the plan drops {name} and gives a level to {unit} inside it; "
                    "leave the latter out"
                )
    return dropped


def replace_dropped(model: nn.Module, plan: Mapping[str, Level]) -> list[str]:
    """Put stand-ins in the place of the sub-blocks that `plan` drops; return their paths.

    `model` may be on the meta device. A plan made for the whole model also names the modules
    of its base model, and the other way round. Raises ValueError for a name that is no sub-block.
    """
    wanted = dropped_units(plan)
    if not wanted:
        return []
    known = {sub.name: sub for sub in find_sub_blocks(model)}
    gone = dropped_modules(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = []
    for unit in wanted:
        names = (unit, unit.removeprefix(prefix), prefix + unit)
        path = next((name for name in names if name in known or name in gone), None)
        if path is None:
            raise ValueError(
                f"the plan drops {unit}, which is no attention or MLP sub-block of this "
                f"{type(model).__name__} that can be dropped{did_you_mean(unit, list(known))}"
            )
        paths.append(path)
    for path in paths:
        if path not in gone:
            model.set_submodule(path, stand_in(model, known[path]))
    return paths


def dropped_modules(model: nn.Module) -> dict[str, Dropped]:
    """Return module path -> stand-in, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Dropped)}


def sentinel_keys(model: nn.Module) -> list[str]:
    """Return one name of a dense weight per dropped sub-block, which the model does not have.

    Saved as empty tensors they make loading fail where hf_evopress is not imported.
    """
    return [f"{name}.{module.dense_key}" for name, module in dropped_modules(model).items()]


def restore_zero(model: nn.Module) -> list[str]:
    """Put real modules whose weights are all zero in the place of stand-ins; return their paths.

    The same function of the input, and a checkpoint that stock transformers loads whole.
    """
    stubs = dropped_modules(model)
    if not stubs:
        return []
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    for name, stub in stubs.items():
        block = model.get_submodule(name.rpartition(".")[0])
        near = next(block.parameters(), next(model.parameters()))
        module = skeleton.get_submodule(name).to_empty(device=near.device).to(dtype=dtype)
        set_zero(module)
        model.set_submodule(name, module.train(stub.training))
    return list(stubs)


def set_zero(module: nn.Module) -> None:
    """Set every parameter and buffer of a sub-block to zero, so that it answers zeros."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()


def _count_tokens(cache: Any, layer: int, hidden: Tensor) -> None:
    """Append zeros for the tokens of `hidden` (batch, seq, dim) to a layer of `cache`."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    keys = getattr(cache.layers[layer], "keys", None) if layer < len(cache.layers) else None
    # 1 head of 1 dimension, unless the layer was allocated in full size before the first call
    heads, dims = (keys.shape[1], keys.shape[3]) if keys is not None and keys.ndim == 4 else (1, 1)
    zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], dims)
    cache.update(zeros, zeros.clone(), layer)


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _dense_key(module: nn.Module) -> str:
    linears = [f"{n}.weight" for n, m in module.named_modules() if isinstance(m, nn.Linear)]
    matrices = [n for n, p in module.named_parameters() if p.ndim == 2]
    others = [n for n, _ in module.named_parameters()]
    return [*linears, *matrices, *others][0]
