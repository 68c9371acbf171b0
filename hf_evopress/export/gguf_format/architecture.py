"""What llama.cpp knows of a model: its architecture's name, its figures, the order of its rows.

Architectures built as Llama is: Llama, Mistral, Qwen2, Qwen3. llama.cpp rotates neighbouring
channels of a Llama head where transformers rotates the two halves, so that the rows of q_proj and
k_proj are stored in another order. Rows move whole: levels are the same before and after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...base.plugins import did_you_mean

# model type in transformers -> architecture in llama.cpp
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ROTATED = ("default", "linear", "llama3")  # rotary tables that a file can say


def architecture_of(config: Any) -> str:
    """Return what llama.cpp calls the architecture, or raise ValueError that says what it lacks."""
    kind, known = config.model_type, list(ARCHITECTURES)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"gguf: no model of type {kind!r} can be written{did_you_mean(kind, known)}"
        )
    found = ARCHITECTURES[kind]
    if (act := getattr(config, "hidden_act", "silu")) != "silu":
        raise ValueError(f"gguf: llama.cpp runs {kind} models with silu, this one has {act}")
    rope = rope_of(config)[1]
    if rope not in _ROTATED or (rope != "default" and found != "llama"):
        raise ValueError(
            f"gguf: rotary embeddings of type {rope!r} cannot be written for {kind} models; "
            f"{', '.join(_ROTATED if found == 'llama' else _ROTATED[:1])} can"
        )
    return found


def rope_of(config: Any) -> tuple[float, str]:
    """Return base and type of the rotary embeddings."""
    said = getattr(config, "rope_parameters", None) or {}
    base = said.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return float(base), said.get("rope_type", "default")


def head_width(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def add_figures(writer: Any, config: Any) -> None:
    """Write the sizes of a model into the header of a file."""
    width, context = head_width(config), config.max_position_embeddings
    # llama.cpp attends to everything here: the same up to the width of a sliding window
    if getattr(config, "sliding_window", None):
        context = min(context, config.sliding_window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope_of(config)[0])
    writer.add_vocab_size(config.vocab_size)


def rope_divisors(config: Any) -> Tensor | None:
    """Return what the rotary frequencies are divided by, (head width / 2,), None where by 1."""
    base, kind = rope_of(config)
    if kind == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = head_width(config)
    plain = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return plain / scaled


def row_order(name: str, config: Any) -> Tensor | None:
    """Return the rows of a tensor in llama.cpp's order, (n,) int64, or None for as they are."""
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", config.num_attention_heads),
    }
    part = name.split(".")[-2]
    if part not in heads:
        return None
    rows = torch.arange(heads[part] * head_width(config))
    return rows.view(heads[part], 2, -1).transpose(1, 2).flatten()
