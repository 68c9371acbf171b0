"""Classes of models other than causal ones, images and sounds, on the second device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_evopress.base.devices import using
from hf_evopress.jobs.pipeline import compress
from hf_evopress.models.classes import call, find_class

from .. import second_device
from . import test_images, test_speech
from .test_classes import IDS, folder, recipe
from .test_images import home as pictures
from .test_speech import home as calls

__all__ = ["calls", "folder", "pictures"]  # fixtures

RTN = [f"rtn:bits={b},group_size=32" for b in (3, 4)]
# along the inputs alone: the second device takes its time for each of the others' small steps
GPTQ = [f"gptq:bits={b},group_size=32,outputs=false" for b in (3, 4)]
CASES = (
    ("T5ForConditionalGeneration", "none", RTN),
    ("T5ForConditionalGeneration", "cpu", GPTQ),
    ("BartForConditionalGeneration", "cpu", RTN),
    ("DistilBertForSequenceClassification", "none", GPTQ),
    ("BertForMaskedLM", "cpu", RTN),
    ("Qwen3Model", "none", GPTQ),
)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "offload", "levels"), CASES)
def test_a_class_is_compressed_and_run_there(
    folder: Callable[[str], Path],
    architecture: str,
    offload: str,
    levels: list[str],
) -> None:
    here = folder(architecture)
    with using("sim"):
        gc.collect()
        before = second_device.live_bytes()
        out = str(here / f"sim-{offload}")
        words = recipe(here, out=out, offload=offload, levels=levels)
        result = compress(words)
        gc.collect()
        assert second_device.live_bytes() == before
    kind = find_class(architecture)
    assert kind is not None
    options = {"dtype": torch.float32}
    there = kind.loader.from_pretrained(result.folder, device_map={"": "sim"}, **options)
    wanted = call(kind.loader.from_pretrained(result.folder, **options).eval(), IDS)
    found = call(there.eval(), IDS.to("sim"))
    assert found.device.type == "sim" and torch.allclose(found.cpu(), wanted, atol=1e-4)


@pytest.mark.slow
def test_a_model_is_calibrated_on_images_there(pictures: Path) -> None:
    more = {"out": str(pictures / "sim"), "offload": "cpu", "vision": True}
    with using("sim"):
        result = compress(test_images.recipe(pictures, **more))
    searched = next(row for row in result.rows if row.name == "searched").report
    assert searched.kl_nats is not None and searched.kl_nats > 0
    assert any("vision_tower" in unit for unit in result.plan)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_model_is_calibrated_on_sounds_there(calls: Path, offload: str) -> None:
    with using("sim"):
        result = compress(test_speech.recipe(calls, out=str(calls / offload), offload=offload))
    searched = next(row for row in result.rows if row.name == "searched").report
    assert searched.kl_nats is not None and searched.kl_nats > 0 and result.sample
