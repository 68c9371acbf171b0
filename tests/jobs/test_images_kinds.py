"""Kinds of vision-language models by their own processors, from conversations to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from hf_evopress.jobs import with_images
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.recipes.recipe import Recipe

from .. import vision_models

SIDE = {"height": 16, "width": 16}
ENDS = "{% endfor %}\n{% endfor %}"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}" + ENDS
)


def _gemma3(tokenizer: Any) -> Any:
    words = {"image_token": "<soft>", "boi_token": "<image>", "eoi_token": "<end>"}
    tokenizer.add_special_tokens({"additional_special_tokens": list(words.values())})
    tokenizer._set_model_specific_special_tokens(words)
    pictures = transformers.Gemma3ImageProcessorPil(size=SIDE)
    template = TEMPLATE.replace("IMAGE", "<image>")
    return transformers.Gemma3Processor(
        pictures, tokenizer, chat_template=template, image_seq_length=4
    )


def _idefics3(tokenizer: Any) -> Any:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    longest = {"longest_edge": 16}
    try:
        pictures = transformers.Idefics3ImageProcessorPil(
            size=longest, max_image_size=longest, do_image_splitting=False
        )
    except ImportError as error:  # transformers 5.16
        pytest.skip(f"without torchvision: {error}")
    template = TEMPLATE.replace("IMAGE", "<image>")
    return transformers.Idefics3Processor(
        pictures, tokenizer, image_seq_len=4, chat_template=template
    )


def _qwen(kind: Any) -> Callable[[Any], Any]:
    def made(tokenizer: Any) -> Any:
        words = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": words})
        pictures = transformers.Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, temporal_patch_size=1, min_pixels=1024, max_pixels=1024
        )
        template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        return _without_videos(kind)(pictures, tokenizer, chat_template=template)

    return made


def _without_videos(kind: Any) -> Any:
    """Return a class of processors that needs no video processor, and so no torchvision."""

    class Processor(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
            return None if name == "video_processor" else self._check(name, value)

        _check = kind.check_argument_for_proper_class

    return Processor


KINDS = {
    "gemma3": (vision_models.gemma3, _gemma3),
    "idefics3": (vision_models.idefics3, _idefics3),
    "qwen2_vl": (vision_models.qwen2_vl, _qwen(transformers.Qwen2VLProcessor)),
    "qwen2_5_vl": (vision_models.qwen2_5_vl, _qwen(transformers.Qwen2_5_VLProcessor)),
    "qwen3_vl": (vision_models.qwen3_vl, _qwen(transformers.Qwen3VLProcessor)),
}


@pytest.fixture(params=KINDS)
def home(
    request: pytest.FixtureRequest,
    byte_tokenizer: PreTrainedTokenizerFast,
    structured_text: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Path:
    """A folder with dense/, a tiny model with its processor, and chats.jsonl."""
    torch.manual_seed(0)
    make, processor = KINDS[request.param]
    model = make()[0].to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "dense")
    byte_tokenizer.save_pretrained(tmp_path / "words")
    made = processor(PreTrainedTokenizerFast.from_pretrained(tmp_path / "words"))
    if "qwen" in request.param:  # saved, it could be read with torchvision only
        monkeypatch.setattr("hf_evopress.jobs.with_images.read_processor", lambda *a, **k: made)
        made.tokenizer.save_pretrained(tmp_path / "dense")
    else:
        made.save_pretrained(tmp_path / "dense")
    text, lines = structured_text(120), []
    for i in range(24):
        Image.new("RGB", (32, 32 + 2 * i), (10 * i, 255 - 10 * i, 99)).save(tmp_path / f"{i}.png")
        asked = [{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": "What?"}]
        said = [{"type": "text", "text": text[20 * i : 20 * i + 24 + i]}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": turns}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(here: Path, **more: Any) -> Recipe:
    counts = {"calibration": 4, "search": 2, "heldout": 1, "test": 2}
    return Recipe.from_dict(
        {
            "model": str(here / "dense"),
            "out": str(here / "out"),
            "budget": {"bits": 4.0},
            "levels": [f"gptq:bits={b},group_size=32" for b in (3, 4)],
            "data": {"sources": [str(here / "chats.jsonl")], "seq_len": 64, **counts},
            "search": {"settings": {"generations": 1}, "sensitivity_tokens": 128},
            **more,
        }
    )


def test_each_kind_is_compressed_on_its_images_and_answers(home: Path) -> None:
    job = Job(recipe(home))
    n_places = int((torch.cat(list(job.tokens.values())) == vision_models.IMAGE).sum())
    assert n_places >= 8
    result = compress(recipe(home))  # raises if the reloaded logits differ in one bit
    searched = next(row for row in result.rows if row.name == "searched").report
    assert searched.kl_nats is not None and 0 < searched.kl_nats < 0.5
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(result.folder)
    processor = with_images.read_processor(result.folder)
    turn = {"role": "user", "content": [{"type": "image", "path": str(home / "3.png")}]}
    asked = processor.apply_chat_template(
        [turn], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (asked["input_ids"] == vision_models.IMAGE).sum() == 4
    assert loaded.generate(**asked, max_new_tokens=4, do_sample=False).shape[1] > 4


@pytest.mark.parametrize("home", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_the_tower_is_compressed_but_where_blocks_read_it(home: Path) -> None:
    if "qwen3" in json.loads((home / "dense" / "config.json").read_text())["model_type"]:
        with pytest.raises(ValueError, match="between its blocks as well.*leave out --vision"):
            compress(recipe(home, vision=True))
        return
    result = compress(recipe(home, vision=True))
    assert any("visual" in unit for unit in result.plan)
