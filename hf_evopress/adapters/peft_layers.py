"""A LoRA layer for PEFT that merges into a compressed layer and unmerges from it.

Stock PEFT wraps a CompressedLinear as it wraps any nn.Linear, but merges by adding to
`base.weight` in place, and a packed weight cannot take that. Here the layer that PEFT makes for
a compressed one is a subclass that puts a dense layer in the packed one's place to merge into,
and the packed one back to unmerge: exact to the bit.

PEFT has no public registry for this that survives a new process (FACTS: custom modules are not
serialised), so `register_with_peft` wraps three methods of `LoraModel` once, when
`peft.tuners.lora.model` is imported, and how any tuner is unloaded. All else stays PEFT's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any

from torch import Tensor, nn

from ..loading.layers import CompressedLinear
from ..loading.packed import PackedWeight
from ..models.ends import input_embedding, output_head

logger = logging.getLogger(__name__)

# They subtract their start from the base weight, which a packed layer cannot take.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


class MergesExactly:
    """What `lora_layer_class` adds to PEFT's layer, which comes behind it among its bases.

    `base_layer` is the packed layer, or a dense one while adapters are merged.
    """

    packed: CompressedLinear | None
    base_layer: Any  # this and what follows is PEFT's
    lora_A: Any
    lora_magnitude_vector: Any
    merged: bool
    merged_adapters: list[str]
    _caches: dict[str, Any]

    @property
    def _stock(self) -> Any:
        """PEFT's methods, behind the ones here."""
        return super()

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        self.__dict__["packed"] = None  # not a submodule: checkpoints hold one base layer
        self._stock.__init__(base_layer, adapter_name, **kwargs)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT would look at `weight`, and so compute it
        if not isinstance(base_layer, CompressedLinear):
            return self._stock._get_base_layer_device_and_dtype(base_layer)
        return next(iter(base_layer.state.values())).device, base_layer.weight_dtype

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        if not isinstance(module, CompressedLinear):
            return self._stock._get_in_out_features(module)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_start(kwargs["config"].init_lora_weights)
        self._stock.update_layer(adapter_name, *args, **kwargs)
        if kwargs["config"].use_dora:
            _check_magnitudes(self.lora_magnitude_vector[adapter_name].weight, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        from peft.tuners.tuners_utils import check_adapters_to_merge

        names = check_adapters_to_merge(self, adapter_names)
        if not any(name in self.lora_A for name in names):
            return  # nothing of these adapters is here: stay packed
        packed = self.base_layer
        if isinstance(packed, CompressedLinear):
            self.base_layer = _dense(packed)
            self.__dict__["packed"] = packed
        try:
            self._stock.merge(safe_merge=safe_merge, adapter_names=names)
        except (ValueError, RuntimeError):
            if isinstance(packed, CompressedLinear):
                self._restore()
            raise

    def unmerge(self) -> None:
        if not self.merged or self.packed is None:
            self._stock.unmerge()
            return
        self._restore()

    def _restore(self) -> None:
        dense, packed = self.base_layer, self.packed
        assert packed is not None  # while it is not, the base layer is the packed one
        self.base_layer = packed.to(dense.weight.device, dense.weight.dtype)
        self.__dict__["packed"] = None
        self.merged_adapters.clear()
        self._caches.clear()

    @contextmanager
    def _unmerged_base_weight(self, safe_merge: bool = False) -> Iterator[Tensor]:
        # what DoRA's norms are of; the packed layer still has it
        base = self.base_layer if self.packed is None else self.packed
        yield base.weight.detach().clone()


@lru_cache(maxsize=None)
def lora_layer_class() -> type[nn.Module]:
    """Return the subclass of peft.tuners.lora.Linear for compressed base layers."""
    from peft.tuners.lora.layer import Linear

    return type("CompressedLoraLinear", (MergesExactly, Linear), {"__doc__": MergesExactly.__doc__})


def register_with_peft() -> None:
    """Make LoRA use `lora_layer_class` over compressed layers; a second call does nothing."""
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    if getattr(LoraModel, "_knows_evopress", False):
        return
    create, replace, inject = (
        LoraModel._create_new_module,
        LoraModel._replace_module,
        LoraModel.inject_adapter,
    )

    @wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        if not isinstance(target, CompressedLinear) or kwargs.get("parameter_name"):
            return create(lora_config, adapter_name, target, **kwargs)
        kwargs.pop("parameter_name", None)
        lora_config.fan_in_fan_out = False
        return lora_layer_class()(target, adapter_name, config=lora_config, **kwargs)

    @wraps(replace)
    def replace_module(self: Any, parent: Any, name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, lora_layer_class()):
            # stock code reads child.weight a dozen times to learn its device
            setattr(parent, name, new_module)
        else:
            replace(self, parent, name, new_module, child)

    @wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
        _exclude_zero_layers(model, self.peft_config[name])
        inject(self, model, name, *args, **kwargs)

    BaseTuner._unload_and_optionally_merge = _keeping_ties(BaseTuner._unload_and_optionally_merge)
    LoraModel._create_new_module = staticmethod(create_new_module)
    LoraModel._replace_module = replace_module
    LoraModel.inject_adapter = inject_adapter
    LoraModel._knows_evopress = True


def _keeping_ties(unload: Any) -> Any:
    """Return PEFT's unloading, which leaves a head that is tied to a packed embedding tied.

    PEFT compares where their weights are, which are computed, each by itself; it would write into
    the config that the head has a weight of its own, and none is saved.
    """

    @wraps(unload)
    def unloaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        config: Any = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not _is_packed_tie(self.model):
            return unload(self, *args, **kwargs)
        config.tie_word_embeddings = False  # PEFT compares only where it says so
        try:
            return unload(self, *args, **kwargs)
        finally:
            config.tie_word_embeddings = True

    return unloaded


def _is_packed_tie(model: nn.Module) -> bool:
    """Return whether the output head reads the packed tensors of the input embedding."""
    ends = [find(model) for find in (input_embedding, output_head)]
    own = [
        {*map(id, m.state.values())} for _, m in filter(None, ends) if isinstance(m, PackedWeight)
    ]
    return len(own) == 2 and bool(own[0] & own[1])


def is_zero(module: Any) -> bool:
    """Return whether `module` is a layer that stores nothing: level `zero`."""
    return isinstance(module, CompressedLinear) and str(module.level) == "zero"


def _dense(packed: CompressedLinear) -> nn.Linear:
    dense = packed.dequantize()
    if dense.bias is not None:  # its own: an adapter's bias is added in place
        dense.bias = nn.Parameter(dense.bias.detach().clone())
    return dense.requires_grad_(False)


def _check_start(init_lora_weights: Any) -> None:
    name = str(init_lora_weights).lower()
    if name.startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={init_lora_weights!r} changes the base weight, and packed weights "
            "cannot change; start from an EoRA adapter (hf-evopress adapt) and train it, use "
            "init_lora_weights=True, or make the start on the dense model and compress after"
        )


def _check_magnitudes(magnitudes: Tensor, kwargs: dict[str, Any]) -> None:
    if magnitudes.is_meta:
        return
    n = int((magnitudes <= 0).sum())
    if n:
        raise ValueError(
            f"DoRA divides by the norm of each row of a weight, and {n} rows of "
            f"{kwargs.get('target_name') or 'a layer'} are zero: add it to exclude_modules, "
            "or use use_dora=False"
        )


def _exclude_zero_layers(model: nn.Module, config: Any) -> None:
    """Keep layers whose weight is zero out of a DoRA adapter: their norms would be divided by."""
    if not getattr(config, "use_dora", False):
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    everything = str(config.target_modules).lower() == "all-linear"
    zero = [n.removesuffix(".base_layer") for n, m in model.named_modules() if is_zero(m)]
    new = [n for n in zero if everything or check_target_module_exists(config, n)]
    if not new:
        return
    known = config.exclude_modules
    if isinstance(known, str):
        config.exclude_modules = "|".join([f"({known})", *map(re.escape, new)])
    else:
        config.exclude_modules = {*(known or ()), *new}
    logger.warning("DoRA leaves out %d layers whose weight is zero: %s", len(new), _some(new))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
