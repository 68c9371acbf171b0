"""A model without weights: shapes and names to check a plan against."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from ..plans.plan import Shape
from ..plans.published import Published, SubBlockNames
from .source import read_config
from .sub_blocks import find_sub_blocks
from .units import find_blocks, find_units


def fit_to(
    config: Published, model: str, *, revision: str | None = None
) -> tuple[dict[str, Shape], SubBlockNames]:
    """Return shapes and names of sub-blocks of `model`, made without weights, for `to_plan`.

    Raises ValueError where a drop configuration has another number of blocks than the model.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(read_config(model, revision=revision))
    n_blocks = len(find_blocks(skeleton)[1])
    if config.kind == "drop" and len(config.blocks) != n_blocks:
        raise ValueError(
            f"{config.name} has {len(config.blocks)} lines, {model} has {n_blocks} blocks"
        )
    names = {
        (sub.block, "attn" if sub.kind == "attention" else "mlp"): sub.name
        for sub in find_sub_blocks(skeleton)
    }

    def sub_block(block: int, part: str) -> str:
        if (block, part) not in names:
            raise ValueError(f"{model} has no {part} in block {block} that can be dropped")
        return names[block, part]

    return {unit.name: unit.shape for unit in find_units(skeleton, in_stock_form=True)}, sub_block
