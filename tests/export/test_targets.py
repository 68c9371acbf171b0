"""Which level runs where: docs/targets.md is the table of this; UPDATE_DOCS=1 writes it anew."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_evopress.base import plugins
from hf_evopress.export.compressed_tensors import check_plan
from hf_evopress.export.exl3_format.tensors import LEVEL, obstacles
from hf_evopress.export.gguf import fits_file
from hf_evopress.export.onnx_format.layers import is_packed
from hf_evopress.loading.kernels.gpu import launch
from hf_evopress.loading.runtimes import KERNELS, TRITON_KERNELS, chosen
from hf_evopress.methods import compose
from hf_evopress.methods.menu import fits
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

TABLE = Path(__file__).parents[2] / "docs" / "targets.md"
SHAPE = (256, 256)
CODES = [
    *(f"gptq:bits={bits},group_size=64" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"gptq:bits={bits},group_size=64,symmetric=true" for bits in (3, 4, 8)),
    "gptq:bits=3,group_size=64 + lowrank:rank=8,factors=int8",
    *(f"trellis:bits={bits}" for bits in (2, 3, 4, 8)),
    "trellis:bits=3,codebook=weyl,scales=channels",
    "trellis:bits=2.5,codebook=weyl,scales=channels",
    LEVEL.format(bits=3),
    "rows:bits=4,group_size=64,top_bits=6",
]
COLUMNS = (
    *("level", "here, CPU", "here, GPU", "as embedding and head"),
    *("`compressed_tensors` (transformers, vLLM)", "GGUF (llama.cpp)", "ONNX (ONNX Runtime)"),
    "EXL3 (exllamav3)",
)


def levels() -> list[Level]:
    """Return the levels above, and the first that each other method shows as an example."""
    shown = {Level.parse(word).terms[0].method for word in CODES}
    others = [compose.method(n) for n in plugins.names("methods") if n not in shown]
    words = [*CODES, *(str(m.examples[0]) for m in others if m.examples)]
    return [x for x in (compose.normalize(w) for w in words) if not x.is_drop and fits(x, SHAPE)]


def told(level: Level, model: nn.Module, unit: str) -> list[str]:
    """Return the cells of a level's row."""
    plan = Plan({unit: level}, {unit: SHAPE})
    try:
        check_plan(model, plan)
        stock = "works"
    except ValueError:
        stock = "refused"
    if level.is_dense:
        return ["works"] * 7
    here = [chosen(level, SHAPE, torch.device(name), torch.bfloat16) for name in ("cpu", "cuda")]
    return [
        *("fast" if choice in (KERNELS, TRITON_KERNELS) else "works" for choice in here),
        _as_end(level, here[0]),
        stock,
        "works" if fits_file(level) else "refused; rounded with `--requantise`",
        "works" if is_packed(level, SHAPE) else "stored dense",
        "refused" if any(obstacles(level, SHAPE)) else "works",
    ]


def _as_end(level: Level, choice: str) -> str:
    if not compose.looks_up_rows(level):
        return "head as here; embedding slow: made whole at each look-up"
    return "fast" if choice == KERNELS else "works"


def test_the_table_in_the_docs_is_what_is(
    tiny_model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_why_not", lambda device: None)  # a GPU with Triton
    model = tiny_model("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    unit = "model.layers.0.self_attn.q_proj"
    assert tuple(model.get_submodule(unit).weight.shape) == SHAPE
    rows = [f"| `{level}` | {' | '.join(told(level, model, unit))} |" for level in levels()]
    table = "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *rows]) + "\n"
    text = TABLE.read_text(encoding="utf-8")
    if os.environ.get("UPDATE_DOCS"):
        TABLE.write_text(re.sub(r"\| level .*?\n(?=\n|\Z)", lambda _: table, text, flags=re.DOTALL))
        return
    for row in rows:
        assert row in text, f"not in {TABLE}: {row}"


@pytest.mark.parametrize(
    "word", ["trellis:bits=4", "bitstack:blocks=3", "rows:bits=4,group_size=32,top_bits=6"]
)
def test_codes_of_another_kind_are_refused_by_stock_formats(
    word: str, tiny_model: Callable[..., nn.Module]
) -> None:
    model = tiny_model("llama")
    unit = "model.layers.0.mlp.down_proj"
    plan = Plan({unit: word}, {unit: tuple(model.get_submodule(unit).weight.shape)})
    with pytest.raises(ValueError, match=f"{unit}.*is not one term with codes"):
        check_plan(model, plan)
