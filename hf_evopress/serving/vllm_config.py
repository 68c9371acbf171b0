"""What vLLM asks about a packed checkpoint: is it served, and how is each layer computed."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization import QuantizationConfig

QUANT_METHOD = "evopress"


class PackedConfig(QuantizationConfig):
    """The quantization "evopress" of vLLM: a plan, and what its layers compute with."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from ..loading.config import EvoPressConfig
        from .plan_lookup import PlanLookup

        own = EvoPressConfig.from_dict(config)
        if own.plan is None:
            raise ValueError("quantization_config in config.json has no plan")
        self.runtime, self.checksums = own.runtime, own.checksums
        self.units = PlanLookup(own.plan)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Return what `quantization_config` of a config.json says."""
        return cls(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # weights are computed by plain operations of PyTorch

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @staticmethod
    def get_checkpoint_weight_mapper() -> Any:
        """Return what leaves out empty tensors: our notice, and the dtype of an embedding."""
        from vllm.model_executor.models.utils import WeightsMapper

        from ..models.size import NOTICE

        return WeightsMapper(orig_to_new_prefix={NOTICE: None}, orig_to_new_suffix={".like": None})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Let units go by the names that vLLM gives their modules."""
        self.units.rename(hf_to_vllm_mapper.map_name)
        self.checksums = self.units.by_unit(self.checksums, hf_to_vllm_mapper.map_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return how `layer` is loaded and computed, None for what is dense as in any model."""
        from .vllm_layers import method_of

        return method_of(self, layer, prefix)
