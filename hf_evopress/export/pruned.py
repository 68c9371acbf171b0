"""A stock checkpoint with fewer layers: blocks that a plan drops whole are taken out.

Saves their bytes, their time and their key-value cache without hf_evopress at the other end.
The weights that stay are dense, as in the dense export. Plans that drop one half of a block are
refused: what the other half computes has no place in a stock model of fewer layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.dropped import dropped_units, replace_dropped
from ..models.plain import make_stock
from ..models.stream import BlockStream
from ..models.sub_blocks import find_sub_blocks
from ..models.units import find_blocks
from ..plans.plan import Plan
from .base import Export, States
from .dense import write_weights

_PLAIN = (bool, int, float, str, type(None))


class PrunedExport(Export):
    """Blocks whose sub-blocks are all dropped are gone, the others are renumbered."""

    name = "pruned"

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        blocks = whole_blocks(model, plan)
        write_weights(model, plan, states)
        make_stock(model)
        replace_dropped(model, plan)
        remove_blocks(model, blocks)
        model.save_pretrained(folder)


def whole_blocks(model: Any, plan: Plan) -> list[int]:
    """Return the numbers of the blocks that `plan` drops whole, or raise ValueError.

    It names the blocks of which only a part is dropped, and refuses to drop all of them.
    """
    dropped = set(dropped_units(plan))
    path, blocks = find_blocks(model)
    subs = find_sub_blocks(model)
    gone, half = [], []
    for number, block in enumerate(blocks):
        inside = {sub.name for sub in subs if sub.block == number} & dropped
        covered = tuple(f"{name}." for name in inside)
        matrices = (n for n, p in block.named_parameters(prefix=f"{path}.{number}") if p.ndim >= 2)
        if inside and all(name.startswith(covered) for name in matrices):
            gone.append(number)
        elif inside:
            half.append(", ".join(sorted(inside)))
    if half:
        raise ValueError(
            "whole blocks can be removed, and the plan drops only a part of "
            f"{len(half)}: {'; '.join(half[:8])}; use the evopress export"
        )
    if not gone:
        raise ValueError("the plan drops no block, so none can be removed; use the dense export")
    if len(gone) == len(blocks):
        raise ValueError(f"the plan drops all {len(blocks)} blocks of the model")
    return gone


def remove_blocks(model: Any, gone: list[int]) -> None:
    """Take the blocks `gone`, which are dropped, out of `model` and of its config.

    Raises ValueError where that is not what a stock model of the new config computes.
    """
    _check_transparent(model, gone)
    path, blocks = find_blocks(model)
    kept = [i for i in range(len(blocks)) if i not in gone]
    config = model.config.get_text_config(decoder=True)
    n_layers = len(blocks)
    model.set_submodule(path, nn.ModuleList(blocks[i] for i in kept))
    for name, value in list(vars(config).items()):
        # one entry per layer: layer_types, no_rope_layers, mlp_layer_types, ...
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == n_layers:
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    for new, block in enumerate(find_blocks(model)[1]):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new  # type: ignore[assignment]
    _check_stock(model, path, kept)


def _check_transparent(model: Any, gone: list[int]) -> None:
    """Raise ValueError unless dropped blocks give back their input, as some with norms do not."""
    stream = BlockStream(model)
    with torch.no_grad():
        hidden = stream.embed(torch.zeros((1, 2), dtype=torch.long))
        hidden = torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(hidden)
        changing = [i for i in gone if not torch.equal(stream.run_block(i, hidden), hidden)]
    if changing:
        raise ValueError(
            f"blocks {changing} of this {type(model).__name__} change the hidden states even "
            "with attention and MLP dropped, so they cannot be removed; use the evopress export"
        )


def _check_stock(model: Any, path: str, kept: list[int]) -> None:
    """Raise ValueError where a model made from the new config has other blocks."""
    with torch.device("meta"):
        fresh = type(model)(model.config)
    wrong = []
    for new, (block, wanted) in enumerate(
        zip(model.get_submodule(path), fresh.get_submodule(path), strict=True)
    ):
        ours, stock = (dict(m.named_modules()) for m in (block, wanted))
        if ours.keys() != stock.keys() or any(_plain(ours[n]) != _plain(stock[n]) for n in ours):
            wrong.append(kept[new])
    if wrong:
        raise ValueError(
            f"blocks {wrong} depend on their place in the model in a way that the config of a "
            f"{type(model).__name__} cannot say; use the evopress export"
        )


def _plain(module: nn.Module) -> dict[str, Any]:
    values = {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN) and k[0] != "_"}
    values.pop("training", None)
    return {"class": type(module).__name__, **values}
