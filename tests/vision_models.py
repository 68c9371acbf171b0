"""Tiny vision-language models of the kinds that there are, each with a row and its image."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

IMAGE, START, END = 256, 257, 258
ENDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
TEXT = {
    **ENDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "head_dim": 16,
}  # fmt: skip
SIDE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
TOWER = {
    **SIDE, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    "model_type": "siglip_vision_model",
}  # fmt: skip
PICTURE = (1, 3, 16, 16)
Made = tuple[Any, list[int], dict[str, Tensor]]  # a model, a row of tokens, what its image became


def llava() -> Made:
    """Return a tiny LLaVA: images are embeddings among others, and nothing else."""
    clip = {**TOWER, "model_type": "clip_vision_model"}
    config = AutoConfig.for_model(
        "llava", text_config={**TEXT, "model_type": "llama"}, vision_config=clip,
        image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    return model, [5, 6, *[IMAGE] * 4, *range(7, 17)], {"pixel_values": torch.randn(PICTURE)}


def gemma3() -> Made:
    """Return a tiny Gemma 3, in which the places of one image see each other."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    own = {"sliding_window": 32, "layer_types": layers}
    config = AutoConfig.for_model(
        "gemma3", text_config={**TEXT, **own, "model_type": "gemma3_text"}, vision_config=TOWER,
        mm_tokens_per_image=4, image_token_id=IMAGE, image_token_index=IMAGE,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    return model, [5, 6, *[IMAGE] * 4, *range(7, 17)], {"pixel_values": torch.randn(PICTURE)}


def paligemma() -> Made:
    """Return a tiny PaliGemma, which sees the text before its answer from both sides."""
    config = AutoConfig.for_model(
        "paligemma", text_config={**TEXT, "model_type": "gemma"},
        vision_config={**TOWER, "vision_use_head": False}, projection_dim=64, hidden_size=64,
        image_token_index=IMAGE, vocab_size=300,
    )  # fmt: skip
    model = transformers.PaliGemmaForConditionalGeneration(config)
    return model, [*[IMAGE] * 4, 5, 6, *range(7, 17)], {"pixel_values": torch.randn(PICTURE)}


def idefics3(name: str = "idefics3") -> Made:
    """Return a tiny Idefics 3, whose images have a dimension of their own, and a mask."""
    tower = {**TOWER, "model_type": f"{name}_vision"}
    config = AutoConfig.for_model(
        name, text_config={**TEXT, "model_type": "llama"}, vision_config=tower,
        image_token_id=IMAGE, scale_factor=1,
    )  # fmt: skip
    kinds = {
        "idefics3": transformers.Idefics3ForConditionalGeneration,
        "smolvlm": transformers.SmolVLMForConditionalGeneration,
    }
    pixels = {
        "pixel_values": torch.randn(1, *PICTURE),
        "pixel_attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool),
    }
    return kinds[name](config), [5, 6, *[IMAGE] * 4, *range(7, 17)], pixels


def smolvlm() -> Made:
    """Return a tiny SmolVLM."""
    return idefics3("smolvlm")


def _qwen(name: str, kind: Any, tower: dict[str, Any]) -> Made:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    tower = {
        "depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "in_channels": 3,
        "temporal_patch_size": 1, **tower,
    }  # fmt: skip
    config = AutoConfig.for_model(
        name, text_config={**TEXT, "rope_parameters": rope, "model_type": f"{name}_text"},
        vision_config=tower, image_token_id=IMAGE, vision_start_token_id=START,
        vision_end_token_id=END, video_token_id=259,
    )  # fmt: skip
    row = [5, START, *[IMAGE] * 4, END, *range(7, 16)]
    pixels = {"pixel_values": torch.randn(16, 192), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return kind(config), row, pixels


def qwen2_vl() -> Made:
    """Return a tiny Qwen2-VL, whose positions have three dimensions."""
    own = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return _qwen("qwen2_vl", transformers.Qwen2VLForConditionalGeneration, own)


def qwen2_5_vl() -> Made:
    """Return a tiny Qwen2.5-VL, whose tower looks at windows."""
    own = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32}
    own["fullatt_block_indexes"] = [1]  # type: ignore[assignment]
    return _qwen("qwen2_5_vl", transformers.Qwen2_5_VLForConditionalGeneration, own)


def qwen3_vl() -> Made:
    """Return a tiny Qwen3-VL, which adds features of its images behind its first blocks."""
    own = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    own |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # type: ignore[dict-item]
    return _qwen("qwen3_vl", transformers.Qwen3VLForConditionalGeneration, own)


MAKERS = [llava, gemma3, paligemma, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_vl]
