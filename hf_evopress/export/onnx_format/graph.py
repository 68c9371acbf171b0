"""What goes into a graph and comes out of it: token ids, a mask, positions, a key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...models.classes import AUDIO_TEXT, CAUSAL, IMAGE_TEXT, class_of

BATCH, PAST, NEW = 2, 3, 2  # of the example that is traced; each may be any number in the graph
AUTO = torch.export.Dim.AUTO


def check_kind(model: Any) -> None:
    """Raise ValueError for models whose parts would be graphs of their own."""
    kind = class_of(model)
    if kind in (IMAGE_TEXT, AUDIO_TEXT) or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"onnx: {type(model).__name__} is more than one graph (encoder and decoder); export it "
            "to dense, and that with an ONNX exporter for its architecture"
        )


def example(model: Any, tokenizer: Any = None) -> dict[str, Any]:
    """Return the inputs of a forward to trace: of a causal model one that goes on from a cache."""
    n = model.get_input_embeddings().num_embeddings
    if not _has_cache(model):
        ids = torch.arange(1, 1 + BATCH * 12).view(BATCH, 12) % n
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        known = inspect.signature(type(model).forward).parameters
        if "token_type_ids" in known and "token_type_ids" in _names(tokenizer):
            made["token_type_ids"] = torch.zeros_like(ids)
        if hasattr(model.config.get_text_config(decoder=True), "use_cache"):
            made["use_cache"] = False
        return made
    ids = torch.arange(1, 1 + BATCH * (PAST + NEW)).view(BATCH, -1) % n
    return step(model, ids[:, PAST:], filled_cache(model, ids[:, :PAST]), past=PAST)


def step(model: Any, ids: Tensor, cache: Any, *, past: int) -> dict[str, Any]:
    """Return the inputs of a forward for `ids` after `past` tokens that the cache holds."""
    positions = torch.arange(past, past + ids.shape[1])[None].expand(len(ids), -1).contiguous()
    mask = torch.ones(len(ids), past + ids.shape[1], dtype=torch.long)
    made: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        made["position_ids"] = positions
    return {**made, "cache": cache, "use_cache": True}


@torch.no_grad()
def filled_cache(model: Any, ids: Tensor) -> Any:
    """Return a cache that holds the keys and values of `ids`."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(**step(model, ids, cache, past=0))
    return cache


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return which sizes of the inputs of `example` may change: texts, tokens, and the past."""
    from transformers.exporters.utils import get_leaf_tensors

    made: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == "cache":
            made[name] = [{0: AUTO, 2: AUTO} for _ in get_leaf_tensors(value)]
        elif isinstance(value, Tensor):
            made[name] = {0: AUTO, 1: AUTO}
    return made


def checks(model: Any, tokenizer: Any = None) -> Iterator[dict[str, Any]]:
    """Yield inputs of other sizes than those traced: a prompt, one token after it, two texts."""
    n = model.get_input_embeddings().num_embeddings
    if not _has_cache(model):
        for shape in ((1, 7), (3, 20)):
            ids = torch.arange(2, 2 + shape[0] * shape[1]).view(shape) % n
            inputs = example(model, tokenizer)
            for name, value in (("input_ids", ids), ("attention_mask", torch.ones_like(ids))):
                inputs[name] = value
            if "token_type_ids" in inputs:
                inputs["token_type_ids"] = torch.zeros_like(ids)
            yield inputs
        return
    ids = torch.arange(2, 34)[None] % n
    yield step(model, ids, empty_cache(model), past=0)
    yield step(model, ids[:, :1], filled_cache(model, ids), past=32)


def empty_cache(model: Any) -> Any:
    """Return a cache of length 0 whose layers have their tensors already."""
    cache = filled_cache(model, torch.ones(1, 1, dtype=torch.long))
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    return cache


def feed(inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return inputs of a forward as ONNX Runtime takes them, by the names that the graph has."""
    from transformers.exporters.utils import onnx_feed

    return dict(onnx_feed(names, inputs))


def _has_cache(model: Any) -> bool:
    return class_of(model) is CAUSAL


def _names(tokenizer: Any) -> list[str]:
    return list(getattr(tokenizer, "model_input_names", []))
