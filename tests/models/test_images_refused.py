"""Models whose masks or positions depend on where images are cannot be run block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_evopress.models.images import Images, example, give_images
from hf_evopress.models.two_stacks import stream_of

IMAGE = 256
ENDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
TEXT = {
    **ENDS, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TOWER = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model",
}  # fmt: skip


def gemma3() -> tuple[Any, list[int], dict[str, torch.Tensor]]:
    """Return a tiny Gemma 3, in which the places of one image see each other, a row, its image."""
    layers = ["sliding_attention", "full_attention"]
    own = {"head_dim": 16, "sliding_window": 32, "layer_types": layers}
    config = AutoConfig.for_model(
        "gemma3", text_config={**TEXT, **own, "model_type": "gemma3_text"}, vision_config=TOWER,
        mm_tokens_per_image=4, image_token_id=IMAGE, image_token_index=IMAGE,
    )  # fmt: skip
    row = [5, 6, *[IMAGE] * 4, *range(7, 17)]
    model = transformers.Gemma3ForConditionalGeneration(config)
    return model, row, {"pixel_values": torch.randn(1, 3, 16, 16)}


def qwen2_vl() -> tuple[Any, list[int], dict[str, torch.Tensor]]:
    """Return a tiny Qwen2-VL, whose positions have three dimensions, a row, its image."""
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    tower = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "mlp_ratio": 2, "in_channels": 3,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "qwen2_vl", text_config={**TEXT, "rope_parameters": rope, "model_type": "qwen2_vl_text"},
        vision_config=tower, image_token_id=IMAGE, vision_start_token_id=257,
        vision_end_token_id=258, video_token_id=259,
    )  # fmt: skip
    row = [5, 257, *[IMAGE] * 4, 258, *range(7, 17)]
    pixels = {"pixel_values": torch.randn(16, 192), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return transformers.Qwen2VLForConditionalGeneration(config), row, pixels


@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_they_are_refused_with_images_and_taken_without(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, row, pixels = make()
    model = model.eval().requires_grad_(False)
    ids = torch.tensor(row)
    images = Images(tmp_path, IMAGE)
    images.add(ids, [pixels])
    stream_of(model).check(torch.arange(5, 13)[None])
    give_images(model, images)
    with pytest.raises(ValueError, match="depend on the tokens.*take text without images"):
        stream_of(model).check(example(model, ids[None]))
