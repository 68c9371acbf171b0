"""Compress a dense checkpoint while it is loaded: one dense weight in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from ..methods import compose
from ..plans.level import Level
from .layers import compress_linear


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
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """Return the tensors that are left for the loader to set: those without a level."""
        if model is None:
            raise ValueError("CompressOnLoad needs the model that is being loaded, got None")
        left = {}
        for name, value in input_dict.items():
            if name not in self.levels:
                left[name] = value
                continue
            self._compress(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return left

    def _compress(self, model: nn.Module, name: str, weight: Tensor) -> None:
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{path} is a {type(linear).__name__}, not an nn.Linear")
        if tuple(weight.shape) != (linear.out_features, linear.in_features):
            raise ValueError(
                f"{name} in the checkpoint has shape {tuple(weight.shape)}, the model has "
                f"({linear.out_features}, {linear.in_features})"
            )
        # a bias sorts before its weight, so it is loaded; if not, it finds the same name later
        state = compose.compress(self.levels[name], weight.detach().float(), None)
        model.set_submodule(path, compress_linear(linear, self.levels[name], state))
