"""transformers' own add_adapter and load_adapter over compressed layers.

transformers 5.24 asks for a PEFT that is not released yet (0.22); what it does with it is run here
with the one that is there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM

IDS = torch.arange(1, 25)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., nn.Module], write_model: Any, tmp_path_factory: Any) -> Path:
    home: Path = write_model(
        tmp_path_factory.mktemp("own"), tiny_model("llama"), "rtn:bits=4,group_size=32"
    )
    return home / "small"


def test_an_adapter_is_added_saved_and_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    after = logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()  # the adapter alone
    again = AutoModelForCausalLM.from_pretrained(folder)
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), after)
    again.disable_adapters()
    assert torch.equal(logits(again), before)
