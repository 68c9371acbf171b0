"""Models that are served: packed by many methods, parts of a layer at levels of their own.

Made by models.py. served/ is random and small, with a dropped block and a packed embedding that is
the head as well; smollm2/ is SmolLM2, where `make demo-model` has fetched it. Both again at 4 bits
throughout, as we save them (NAME-4bit) and as an export for vLLM (NAME-4bit-export).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache" / "SmolLM2-135M-Instruct"
HEAD_DIM = 32  # the least that vLLM's attention on CPUs takes

MIXED = {
    "model.embed_tokens": "rows:bits=4,top_bits=6,top=0.1,group_size=64",
    "model.layers.0.self_attn.q_proj": "gptq:bits=3,group_size=64",
    "model.layers.0.self_attn.k_proj": "rtn:bits=8,group_size=32",
    "model.layers.0.self_attn.o_proj": "lowrank:rank=16",
    "model.layers.0.mlp.gate_proj": "trellis:bits=3,state_bits=10",
    "model.layers.0.mlp.up_proj": "sparsegpt:sparsity=0.5,bits=4,group_size=64",
    "model.layers.0.mlp.down_proj": "gptq:bits=2,group_size=64 + lowrank:rank=16",
    "model.layers.1.self_attn": "drop",
    "model.layers.1.mlp.gate_proj": "magnitude:sparsity=0.5",
    "model.layers.1.mlp.down_proj": "rtn:bits=5,group_size=64",
    "model.layers.2.self_attn.v_proj": "rtn:bits=4,group_size=64",
}
FOR_SMOLLM2 = ("rtn:bits=8,group_size=64", "rtn:bits=5,group_size=64", "rtn:bits=6,group_size=32")
# vLLM, which computes in bfloat16, rounds scales to it
SYMMETRIC = "rtn:bits=4,group_size=64,symmetric=true,scales=bfloat16"


def make_served(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write served/ and its 4-bit versions into `folder`."""
    _save(folder / "served", model, tokenizer, MIXED)
    _at_four_bits(folder, "served", model, tokenizer)


def make_smollm2(folder: Path) -> None:
    """Write smollm2/ and its 4-bit versions into `folder`, where the model is here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_evopress.models.ends import find_ends
    from hf_evopress.models.units import find_units

    if not SMOLLM2.is_dir():
        return
    model: Any = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    units = [*find_units(model), *find_ends(model)]
    levels = {u.name: FOR_SMOLLM2[i % len(FOR_SMOLLM2)] for i, u in enumerate(units)}
    _save(folder / "smollm2", model, tokenizer, levels)
    _at_four_bits(folder, "smollm2", model, tokenizer)


def _at_four_bits(folder: Path, name: str, model: Any, tokenizer: Any) -> None:
    from hf_evopress.jobs.convert import convert
    from hf_evopress.models.units import find_units

    levels = {unit.name: SYMMETRIC for unit in find_units(model)}
    _save(folder / f"{name}-4bit", model, tokenizer, levels)
    convert(
        str(folder / f"{name}-4bit"), folder / f"{name}-4bit-export", format="compressed_tensors"
    )


def _save(folder: Path, model: Any, tokenizer: Any, levels: dict[str, str]) -> None:
    """Write `model` packed at `levels`, made with statistics of random inputs where needed."""
    import copy

    from hf_evopress.loading.quantizer import attach
    from hf_evopress.loading.replace import replace_linears
    from hf_evopress.methods import compose
    from hf_evopress.methods.maths.linalg import Stats
    from hf_evopress.models.dropped import replace_dropped
    from hf_evopress.plans.plan import Plan

    def states(unit: str, level: Any) -> dict[str, Tensor]:
        weight = packed.get_submodule(unit).weight.detach().float()
        X = torch.randn(512, weight.shape[1], generator=torch.Generator().manual_seed(0))
        stats = Stats(X.T @ X / len(X), None, X.mean(0), len(X))
        return compose.compress(compose.normalize(level), weight, stats)

    packed = copy.deepcopy(model)
    shapes = {u: tuple(packed.get_submodule(u).weight.shape) for u in levels if levels[u] != "drop"}
    plan = Plan(levels, shapes)
    replace_dropped(packed, plan)
    replace_linears(packed, plan, states)
    attach(packed, plan)
    packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
