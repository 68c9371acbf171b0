"""What differs between versions of transformers, 5.16 to 5.24: one interface for all of them.

    5.16 - 5.20   update_weight_conversions(conversions), update_tp_plan(config); a tensor that is
                  renamed while it is loaded keeps the dtype of its file
    from 5.21     update_weight_conversions(conversions, model), update_parallel_plan(model, plan);
                  every tensor takes the dtype of the module
    from 5.24     activation_checkpointing, which was gradient_checkpointing

Nothing was run with versions before 5.16.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

HAS_MODEL = "model" in inspect.signature(HfQuantizer.update_weight_conversions).parameters


Dtypes = dict[str, torch.dtype]


class AnyHfQuantizer(HfQuantizer):
    """What our quantizer builds on, which defines the first three methods."""

    def look_at(self, model: Any) -> None:
        """Note what `conversions` has to know of a model, which is not passed up to 5.20."""

    def conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return what transformers is to convert while it loads or saves."""
        return weight_conversions

    def check_parallel(self, config: Any) -> None:
        """Raise ValueError for a config that asks for parallelism which cannot be had."""

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Called while loading and saving, with the model from 5.21 on."""
        if model:
            self.look_at(*model)
        made = self.conversions(weight_conversions)
        return super().update_weight_conversions(made, *(model if HAS_MODEL else ()))

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Called from 5.21 on."""
        self.check_parallel(model.config)

    def update_tp_plan(self, config: Any) -> Any:
        """Called up to 5.20."""
        self.check_parallel(config)
        return config


def dtypes_of(model: nn.Module) -> Dtypes:
    """Return the dtypes of a model's float parameters, by name."""
    return {n: p.dtype for n, p in model.named_parameters() if p.is_floating_point()}


@torch.no_grad()
def settle_dtypes(model: nn.Module, dtypes: Dtypes) -> None:
    """Give loaded float parameters the dtypes that the model was made with."""
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and not parameter.is_meta:
            parameter.data = parameter.data.to(wanted)


def training_words(settings: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return settings of TrainingArguments by the names that are `known` to this version."""
    old = {
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    }
    return {k if k in known else old.get(k, k): v for k, v in settings.items()}
