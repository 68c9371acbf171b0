"""Architectures whose scored and shipped forms differ: experts fused in the file, Conv1D, Falcon.

In bfloat16, where two orders of summation round apart: what was scored is what is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.cli import main
from hf_evopress.jobs import pipeline
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.models.dropped import dropped_modules
from hf_evopress.recipes.recipe import Recipe

TinyModel = Callable[..., nn.Module]

DENSE_EXPERTS = {
    "budget": {"bits": 9.0},
    "levels": ["rtn:bits=8,group_size=32"],
    "skip": ["*experts*"],
}
DROPS = {"budget": {"drop": 0.5}}


@pytest.fixture
def make(
    tiny_model: TinyModel, structured_text: Any, write_model: Any, tmp_path: Path
) -> Callable[..., Path]:
    def made(arch: str) -> Path:
        model = tiny_model(arch, max_position_embeddings=64).to(torch.bfloat16)
        (tmp_path / "text.txt").write_text(structured_text(120))
        return write_model(tmp_path, model)

    return made


def compressed(home: Path, **changes: Any) -> pipeline.Result:
    values = {
        "model": str(home / "dense"),
        "out": str(home / "out"),
        "data": {"sources": [str(home / "text.txt")], "seq_len": 32, "calibration": 4, "search": 4},
        "search": {
            "sensitivity_tokens": 128,
            "settings": {"generations": 1, "tokens": [64, 64]},
        },
    }
    return pipeline.compress(Recipe.from_dict({**values, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [DENSE_EXPERTS, DROPS], ids=["dense experts", "drops"])
@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_dense_experts_are_scored_as_they_are_shipped(
    make: Callable[..., Path], arch: str, changes: dict[str, Any]
) -> None:
    home = make(arch)
    result = compressed(home, **changes)  # compares what it loads with what was scored
    loaded = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.bfloat16)
    packed = [name for name in compressed_linears(loaded) if "self_attn" in name]
    assert len(packed) == (8 if changes is DENSE_EXPERTS else 0)
    assert len(dropped_modules(loaded)) == (2 if changes is DROPS else 0)
    assert not any("experts" in name for name in [*result.plan, *compressed_linears(loaded)])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "falcon"])
def test_drops_only_leave_layers_of_other_classes_as_they_are(
    make: Callable[..., Path], arch: str
) -> None:
    home = make(arch)
    result = compressed(home, **DROPS)
    loaded = AutoModelForCausalLM.from_pretrained(result.folder)
    assert len(dropped_modules(loaded)) == 2 and not compressed_linears(loaded)
    kept = "Conv1D" if arch == "gpt2" else "FalconLinear"
    assert kept in {type(module).__name__ for module in loaded.modules()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_of_a_dense_model_are_those_of_its_file(
    tiny_model: TinyModel,
    structured_text: Any,
    write_model: Any,
    tmp_path: Path,
    dtype: torch.dtype,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model(max_position_embeddings=64).to(dtype)
    home, text = write_model(tmp_path, model), tmp_path / "text.txt"
    text.write_text(structured_text(8))
    bits = 8 * dtype.itemsize
    words = ["evaluate", str(home / "dense"), "--data", str(text), "--max-windows", "1", "--json"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    assert json.loads(capsys.readouterr().out)["bits_per_weight"] == bits
