"""Vision-language models block by block, with masks and positions that depend on their images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.models.block_arguments import held_bytes
from hf_evopress.models.classes import CAUSAL, IMAGE_TEXT, call, find_class, takes_images
from hf_evopress.models.images import Images, example, give_images
from hf_evopress.models.two_stacks import stream_of
from hf_evopress.models.units import find_units

from ..vision_models import IMAGE, MAKERS, Made


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def seeing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Tensor]:
    """Return a model that was given images, and rows: one of text, two with one image each."""
    torch.manual_seed(0)
    make: Callable[[], Made] = request.param
    model, row, pixels = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    model = model.eval().requires_grad_(False)
    later = row if row[0] == IMAGE else [9, *row[:-1]]  # PaliGemma's images come first
    later = [*later[:-1], 11]
    rows = torch.tensor([list(range(20, 20 + len(row))), row, later])
    images = Images(tmp_path / "images", IMAGE)
    for ids in rows[1:]:
        images.add(ids, [{k: v * 2 if v.is_floating_point() else v for k, v in pixels.items()}])
    give_images(model, images)
    return model, rows


def test_block_by_block_is_the_forward_with_images(seeing: tuple[Any, Tensor]) -> None:
    model, rows = seeing
    stream = stream_of(model)
    with torch.no_grad():
        for ids in (example(model, rows), rows[1:], rows[:1], rows[2:]):
            stream.check(ids)
        found = call(model, rows[1:2])
        assert not torch.equal(found, call(model, rows[1:2], with_images=False))


def test_the_tower_runs_once_for_a_batch_first_seen(seeing: tuple[Any, Tensor]) -> None:
    model, rows = seeing
    stream = stream_of(model)
    towers = [
        m
        for n, m in model.named_modules()
        if n.endswith(("visual", "vision_tower", "vision_model"))
    ]
    runs: list[int] = []
    hook = towers[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        first = stream.embed(rows[1:2])
        assert len(runs) == 1
        assert torch.equal(stream.embed(rows[1:2]), first)
    with torch.enable_grad():
        assert torch.equal(stream.embed(rows[1:2]), first)
    hook.remove()


def test_what_blocks_get_is_kept_up_to_a_number_of_bytes(
    seeing: tuple[Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = seeing
    stream, batches = stream_of(model), list(rows.split(1))
    with torch.no_grad():
        wanted = [stream.run_block(0, stream.embed(ids), ids) for ids in batches]
        assert len(stream._captured) == 3
        most = held_bytes(next(iter(stream._captured.values()))) + 1
        monkeypatch.setattr("hf_evopress.models.stream._MAX_BYTES", most)
        stream = stream_of(model)
        for ids, hidden in zip(batches, wanted, strict=True):
            assert torch.equal(stream.run_block(0, stream.embed(ids), ids), hidden)
            assert len(stream._captured) == 1


def test_calibration_sees_every_layer(seeing: tuple[Any, Tensor], tmp_path: Path) -> None:
    model, rows = seeing
    calibrate(model, rows, tmp_path, batch_tokens=32)
    output_moments(model, rows, tmp_path, batch_tokens=32)
    for unit in find_units(model):
        stats = load_stats(tmp_path, unit.block)[unit.name]
        assert stats.n_tokens == rows.numel()
        assert load_moments(tmp_path, unit.block)[unit.name].diagonal().max() > 0


def test_a_step_that_has_no_tokens_refuses(seeing: tuple[Any, Tensor]) -> None:
    model, rows = seeing
    stream = stream_of(model)
    hidden = stream.embed(rows[1:])
    with pytest.raises(ValueError, match="does not take along: take text without images"):
        stream.run_block(0, hidden)


def test_a_class_that_is_causal_as_well_takes_images_and_all_that_is_of_causal_models() -> None:
    def config(name: str) -> Any:
        return transformers.PretrainedConfig(architectures=[name])

    gemma3, llava = "Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"
    assert find_class(gemma3) is CAUSAL and find_class(llava) is IMAGE_TEXT
    assert takes_images(config(gemma3)) and takes_images(config(llava))
    assert not takes_images(config("LlamaForCausalLM")) and not takes_images(object())
