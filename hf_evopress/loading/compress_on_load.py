"""Compress a dense checkpoint while it is loaded: one dense weight in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ..methods import compose
from ..models.source import is_finite
from ..plans.level import Level
from .replace import replace


class CompressOnLoad(ConversionOps):
    """The loader's operation on a dense weight: pack it and put a CompressedLinear in place.

    levels: parameter name ("model.layers.0.mlp.up_proj.weight") -> data-free level.
    """

    def __init__(self, levels: Mapping[str, Level]) -> None:
        self.levels = levels

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Return the tensors that are left for the loader to set: those without a level."""
        if model is None:
            raise ValueError("CompressOnLoad needs the model that is being loaded, got None")
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            # what holds NaN stays dense: an error here is caught by the loader, which goes on;
            # all such weights are named once everything is there
            if name not in self.levels or not is_finite(weight):
                left[name] = value
                continue
            tied = [k for k, v in (model.all_tied_weights_keys or {}).items() if v == name]
            self._compress(model, name, weight)
            if missing_keys is not None:
                missing_keys -= {name, *tied}
        return left

    def _compress(self, model: nn.Module, name: str, weight: Tensor) -> None:
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            raise TypeError(f"{path} is a {type(module).__name__}, not an nn.Linear")
        if weight.shape != module.weight.shape:
            raise ValueError(
                f"{name} in the checkpoint has shape {tuple(weight.shape)}, the model has "
                f"{tuple(module.weight.shape)}"
            )
        # a bias sorts before its weight, so it is loaded; if not, it finds the same name later
        state = compose.compress(self.levels[name], weight.detach().float(), None)
        replace(model, path, self.levels[name], state)
