"""The layers of vLLM that are packed in the checkpoint: linear layers, embedding, head.

vLLM asks a method to register what a layer loads, and to compute with it. A layer keeps the
parameters that the checkpoint has a name for as empty placeholders while it is loaded, and its
packed tensors in `evopress`, a module of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from ..loading.runtimes import check_runtime
from .plan_lookup import Member
from .shards import PackedParts, Shards, SharedRows


def method_of(config: Any, layer: nn.Module, prefix: str) -> Any:
    """Return the method of a layer, None where vLLM has to choose one for a dense layer.

    config: the PackedConfig of vllm_config.py.
    Raises ValueError for layers that are packed in the checkpoint and have no place here.
    """
    if isinstance(layer, LinearBase):
        return _method_of_linear(config, layer, prefix)
    if isinstance(layer, VocabParallelEmbedding):
        return _method_of_end(config, layer, prefix)
    inside = config.units.packed_inside(prefix) if prefix else []
    if inside and not config.units.is_dropped(prefix):
        raise ValueError(
            f"{type(layer).__name__} {prefix} of vLLM holds {', '.join(inside[:3])} as one tensor, "
            "and packed experts are not served; compress this model with --skip for its experts, "
            "or serve an export (`hf-evopress export --format dense`)"
        )
    return None


def _method_of_linear(config: Any, layer: Any, prefix: str) -> Any:
    if config.units.is_dropped(prefix):
        return DroppedLinear()
    # set by the classes of vLLM before they ask: one size per part of the checkpoint
    sizes = list(getattr(layer, "output_sizes", None) or [layer.output_size])
    members = config.units.members(prefix, sizes, layer.input_size, config.packed_modules_mapping)
    if not members:
        return UnquantizedLinearMethod()
    _check_eager()
    return PackedLinear(config, members)


def _method_of_end(config: Any, layer: Any, prefix: str) -> Any:
    shape = (layer.org_vocab_size, layer.embedding_dim)
    is_head = isinstance(layer, ParallelLMHead)
    member = config.units.end(prefix, shape) if prefix or not is_head else None
    if member is not None:
        _check_eager()
        return PackedLinear(config, [member]) if is_head else PackedEmbedding(config, [member])
    return MaybeTiedHead() if is_head else None


class _Packed(ABC):
    """What linear layers and the embedding have in common: packed parts, checked when loaded."""

    def __init__(self, config: Any, members: Sequence[Member]) -> None:
        self.config, self.members = config, members

    @abstractmethod
    def parts(self, dtype: torch.dtype) -> PackedParts:
        """Return the module that holds the packed tensors."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register packed tensors, and placeholders by their names in the checkpoint."""
        cut = input_size // input_size_per_partition, output_size // sum(output_partition_sizes)
        _check_whole(self.members, cut)
        check_runtime(self.config.runtime, params_dtype)
        _hold(layer, self.parts(params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that all is there, and choose what computes it."""
        _finish(layer, self.config)


class PackedLinear(_Packed, LinearMethodBase):
    """A linear layer or head whose parts are packed, each at its own level."""

    def parts(self, dtype: torch.dtype) -> PackedParts:
        return Shards(self.members, dtype, self.config.checksums)

    def process_weights_after_loading(self, layer: Any) -> None:
        bias = getattr(layer, "bias", None)
        if bias is not None and not getattr(layer, "skip_bias_add", False):
            layer.evopress.set_bias(bias.data)
        super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.evopress(x)  # the parts have their share of the bias


class PackedEmbedding(_Packed, QuantizeMethodBase):
    """An input embedding that is packed, and the head that has its weight."""

    def parts(self, dtype: torch.dtype) -> PackedParts:
        return SharedRows(self.members[0], dtype, self.config.checksums)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        return layer.evopress.look_up(input_)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = layer.evopress(x)
        return logits if bias is None else logits + bias


class MaybeTiedHead(UnquantizedEmbeddingMethod):
    """A head that is not in the plan: dense, or it has the weight of a packed embedding."""

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head compute with the packed tensors of the embedding."""
        if not isinstance(embed_tokens.quant_method, PackedEmbedding):
            return super().tie_weights(layer, embed_tokens)
        del layer.weight
        layer.evopress, layer.quant_method = embed_tokens.evopress, embed_tokens.quant_method
        return layer


class DroppedLinear(LinearMethodBase):
    """A linear layer of a dropped sub-block: it answers zeros, so that the block adds nothing."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *_: Any,
        **__: Any,
    ) -> None:
        """Register a placeholder for the empty tensor that a checkpoint may have."""
        layer.evopress_outputs = sum(output_partition_sizes)
        weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        weight.weight_loader = _takes_nothing  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], layer.evopress_outputs)


def _takes_nothing(_: Any, tensor: Tensor, shard: Any = None) -> None:
    if tensor.numel():
        raise ValueError(f"a dropped layer has a weight of shape {tuple(tensor.shape)}")


def _check_eager() -> None:
    """Raise ValueError where vLLM compiles the model: other text came out then (vLLM 0.32, CPU)."""
    if get_current_vllm_config().compilation_config.mode:
        raise ValueError(
            "packed layers are served uncompiled: enforce_eager=True, or --enforce-eager on the "
            "command line"
        )


def _check_whole(members: Sequence[Member], cut: tuple[int, int]) -> None:
    """Raise ValueError where tensor parallelism cuts a layer into this many parts."""
    if max(cut) > 1:
        raise ValueError(
            f"{members[0].unit} is packed and cannot be cut into {max(cut)} parts: "
            "tensor_parallel_size=1 serves it; pipeline and data parallelism need no cut"
        )


def _hold(layer: Any, parts: PackedParts) -> None:
    layer.evopress = parts
    for name, parameter in parts.placeholders().items():
        layer.register_parameter(name, parameter)


def _finish(layer: Any, config: Any) -> None:
    for name in layer.evopress.placeholders():
        if name in layer._parameters:
            del layer._parameters[name]
    layer.evopress.finish(config.runtime)
