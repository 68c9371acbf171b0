"""Experts, LoRD, cards without bfloat16 and parts of a model on disk, on the second device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.folder import load_adapter, read_adapter
from hf_evopress.adapters.lord import from_peft, to_peft
from hf_evopress.base.devices import using
from hf_evopress.jobs import pipeline
from hf_evopress.jobs.job import Job
from hf_evopress.recipes.recipe import Recipe

from .. import second_device
from ..conftest import make_structured_text
from ..second_device_backend import backend

IDS = torch.arange(12)[None] + 97
SIM = torch.device("sim", 0)


@pytest.fixture(autouse=True)
def sim() -> Any:
    """All that says auto computes on the second device."""
    with using("sim") as device:
        yield device


def recipe(folder: Path, *levels: str, **changes: Any) -> Recipe:
    (folder / "text.txt").write_text(make_structured_text(400, seed=5))
    values: dict[str, Any] = {
        "model": str(folder / "dense"),
        "out": str(folder / "out"),
        "budget": {"ratio": 1.0},
        "levels": list(levels),
        "data": {
            "sources": [str(folder / "text.txt")],
            "seq_len": 32,
            "calibration": 8,
            "search": 2,
            "heldout": 2,
            "test": 2,
        },
        "search": {"strategy": "knapsack", "sensitivity_tokens": 128},
    }
    return Recipe.from_dict({**values, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture, level",
    [
        ("mixtral", "gptq:bits=4,group_size=32,outputs=false"),  # small steps take their time there
        ("gpt_oss", "rtn:bits=4,group_size=32"),
    ],
)
def test_experts_are_compressed_loaded_and_run_there(
    architecture: str,
    level: str,
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    write_model: Callable[..., Path],
) -> None:
    write_model(tmp_path, tiny_model(architecture).to(torch.bfloat16))
    gc.collect()  # what other tests left behind may go at any time
    before = second_device.live_bytes()
    result = pipeline.compress(recipe(tmp_path, level))
    assert second_device.live_bytes() == before
    here = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    there = AutoModelForCausalLM.from_pretrained(
        result.folder, dtype=torch.float32, device_map={"": "sim"}
    )
    with torch.no_grad():
        wanted, found = here(input_ids=IDS).logits, there(input_ids=IDS.to(SIM)).logits.cpu()
    assert torch.allclose(found, wanted, atol=1e-4)


def test_low_rank_layers_become_an_adapter_and_come_back_there(
    tmp_path: Path, tiny_model: Callable[..., nn.Module], write_model: Callable[..., Path]
) -> None:
    write_model(tmp_path, tiny_model(), "gptq:bits=3,group_size=32 + lowrank:rank=4", tokens=IDS)
    options: Any = {"dtype": torch.float32, "device_map": {"": "sim"}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", **options)
    with torch.no_grad():
        wanted = model(input_ids=IDS.to(SIM)).logits
        rest = to_peft(model, tmp_path / "adapter")
        beside = load_adapter(rest, tmp_path / "adapter")(input_ids=IDS.to(SIM)).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", **options)
    again = from_peft(to_peft(again, tmp_path / "twice"), read_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        found = again(input_ids=IDS.to(SIM)).logits
    assert beside.device == SIM and torch.allclose(beside.cpu(), wanted.cpu(), atol=1e-5)
    assert torch.equal(found.cpu(), wanted.cpu())


class OnCard:
    """safetensors' file, which knows no device "sim": its tensors are read by the CPU and moved."""

    def __init__(self, file: str, *, framework: str, device: Any) -> None:
        self.file, self.device = safe_open(file, framework=framework), device

    def __enter__(self) -> OnCard:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name).to(self.device)


@pytest.mark.filterwarnings("ignore:.*offload")
def test_blocks_on_disk_come_to_the_card_to_run(
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("accelerate.utils.offload.safe_open", OnCard)
    write_model(tmp_path, tiny_model(num_hidden_layers=3), "rtn:bits=4,group_size=32")
    parts = {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0"}
    where = {**dict.fromkeys(parts, "sim:0"), "model.layers.1": "cpu", "model.layers.2": "disk"}
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, device_map=where, offload_folder=tmp_path / "off"
    )
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    wanted = here.generate(IDS, max_new_tokens=4, do_sample=False)
    found = there.generate(IDS.to(SIM), max_new_tokens=4, do_sample=False)
    assert found.cpu().tolist() == wanted.tolist()


def test_a_card_without_bfloat16_computes_in_float32_and_says_so(
    tmp_path: Path,
    tiny_model: Callable[..., nn.Module],
    write_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_model(tmp_path, tiny_model().to(torch.bfloat16))
    words = recipe(tmp_path, "rtn:bits=4,group_size=32")
    with caplog.at_level(logging.INFO):
        assert Job(words).compute_dtype == torch.bfloat16
    assert "bfloat16" not in caplog.text
    monkeypatch.setattr(backend, "is_bf16_supported", lambda including_emulation=True: False)
    with caplog.at_level(logging.INFO):
        job = Job(words)
    assert job.compute_dtype == job.search_dtype == torch.float32
    assert "does not multiply in bfloat16: computing in float32" in caplog.text
