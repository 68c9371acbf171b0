"""Every method of PEFT over compressed layers: it trains and comes back, or is refused by name.

docs/peft.md is the table of this; UPDATE_DOCS=1 writes it anew.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

METHODS = {str(getattr(t, "value", t)): kind for t, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
TABLE = Path(__file__).parents[2] / "docs" / "peft.md"
IDS = torch.arange(1, 25)[None]

OF_ONE_SHAPE = ("VERA", "PVERA", "VBLORA", "RANDLORA")  # they share matrices between layers
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 16},
}
# Not run: why they are no matter of compressed layers, or need more than this test has.
LEFT_OUT = {
    "ADAMSS": "needs scikit-learn",
    "CPT": "needs labelled prompts of a dataset",
    "MULTITASK_PROMPT_TUNING": "needs task ids with each batch",
    "POLY": "needs task ids with each batch",
    "SHADOW": "needs a second model",
    "XLORA": "mixes LoRA adapters that have been trained",
}
REFUSED = {"GLORA": r"CompressedLinear.* is not a plain torch\.nn\.Linear"}


@pytest.fixture(scope="module")
def packed(tiny_model: Callable[..., nn.Module]) -> Any:
    model = tiny_model("llama")
    levels = {"q_proj": "rtn:bits=4,group_size=32", "up_proj": "rtn:bits=3,group_size=32"}
    units = find_units(model)
    plan = Plan(
        {u.name: levels.get(u.name.rpartition(".")[2], "dense") for u in units},
        shapes={u.name: u.shape for u in units},
    )
    compress_model(model, plan, None)
    attach(model, plan)
    return model


def config(method: str) -> Any:
    """Return a config of a method for the layers that are packed."""
    kind = METHODS[method]
    known = {f.name for f in dataclasses.fields(kind)}
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in known:
        settings["target_modules"] = ["q_proj"] if method in OF_ONE_SHAPE else ["q_proj", "up_proj"]
    if "num_virtual_tokens" in known:
        settings["num_virtual_tokens"] = 4
    return kind(**settings | SETTINGS.get(method, {}))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in {*LEFT_OUT, *REFUSED}])
@pytest.mark.filterwarnings("ignore")
def test_a_method_gets_gradients_and_comes_back(method: str, packed: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(packed), config(method))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    moved = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert any(p.grad.abs().sum() > 0 for p in moved)
    model.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(packed), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("method", [m for m in REFUSED if m in METHODS])
def test_a_method_that_cannot_is_refused_by_name(method: str, packed: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED[method]):
        peft.get_peft_model(copy.deepcopy(packed), config(method))


def test_the_table_says_so() -> None:
    rows = []
    for method in sorted(METHODS):
        said = "works"
        if method in REFUSED:
            said = "refused: it takes plain `nn.Linear` layers only"
        elif method in LEFT_OUT:
            said = f"not tried: {LEFT_OUT[method]}"
        rows.append(f"| {METHODS[method].__name__} | {said} |")
    table = "\n".join(["| config of PEFT | over compressed layers |", "|---|---|", *rows]) + "\n"
    text = TABLE.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_DOCS"):
        TABLE.write_text(re.sub(r"\| config.*", lambda _: table, text, flags=re.DOTALL))
        return
    shown = dict(re.findall(r"^\| (\w+Config) \| (.*) \|$", text, re.MULTILINE))
    assert all(row.split(" | ")[1] == f"{shown[row.split()[1]]} |" for row in rows)
