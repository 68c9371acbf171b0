"""A model of the same class with fewer key-value groups, or fewer channels in each MLP.

Stock configs have one width for all blocks, so every block keeps as many. Blocks of q, k, v, o and
gate, up, down projections (Llama, Mistral, Qwen).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .units import find_blocks, find_units

KV, CHANNELS = "kv", "channels"
DOWN = "mlp.down_proj"  # of a block
MLP = ("mlp.gate_proj", "mlp.up_proj", DOWN)


def widths(model: Any) -> dict[str, int]:
    """Return how many KV groups and channels each block has; ValueError for other blocks."""
    config = model.config.get_text_config(decoder=True)
    names = [f"self_attn.{part}_proj" for part in "qkvo"]
    names += MLP
    for block in find_blocks(model)[1]:
        found = {name for name, _ in block.named_modules()}
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"structures are pruned in blocks such as Llama's; those of "
                f"{type(model).__name__} have no {missing[0]}"
            )
    return {KV: config.num_key_value_heads, CHANNELS: config.intermediate_size}


def kept_channels(
    model: Any, shares: Sequence[float], *, skip: Sequence[str] = (), step: int = 64
) -> tuple[int, ...]:
    """Return how many channels of each MLP the shares leave, in multiples of `step` if it is one.

    skip: patterns of units that are left as they are. ValueError for blocks that cannot be
    narrowed, or where a share leaves none.
    """
    if getattr(model.config, "auto_map", None):
        raise ValueError(
            f"{type(model).__name__} brings its own code, which may not know other widths: widths "
            "are of models of transformers itself"
        )
    n = widths(model)[CHANNELS]
    path, blocks = find_blocks(model)
    units = {unit.name for unit in find_units(model, skip=skip)}
    names = [f"{path}.{i}.{part}" for i in range(len(blocks)) for part in MLP]
    if missing := [name for name in names if name not in units]:
        raise ValueError(f"widths changes {missing[0]}, which skip leaves as it is")
    step = math.gcd(n, step)
    found = tuple(step * round(share * n / step) for share in shares)
    for share, kept in zip(shares, found, strict=True):
        if not kept:
            raise ValueError(
                f"a width of {share:g} leaves none of {n} channels, in steps of {step}"
            )
    if len(set(found)) < len(found):
        raise ValueError(
            f"widths {', '.join(f'{x:g}' for x in shares)} of {n} channels are {found} in steps of "
            f"{step}: leave those out that are the same"
        )
    return found


@torch.no_grad()
def narrowed(
    model: Any, *, kv: Sequence[Tensor] | None = None, channels: Sequence[Tensor] | None = None
) -> Any:
    """Return `model`, changed in place, with some of its structures, and a config that says so.

    kv, channels: for each block the numbers (n,) of those that stay, n the same for all; None
    leaves that kind whole. It computes what the model does with the others' outputs at 0.
    """
    config = model.config.get_text_config(decoder=True)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    blocks: Any = find_blocks(model)[1]
    size = blocks[0].self_attn.o_proj.in_features // heads
    for number, block in enumerate(blocks):
        if kv is not None:
            of_kv = _spread(kv[number], size)
            of_q = _spread(kv[number], size * heads // groups)
            _slice(block.self_attn, ("k_proj", "v_proj"), of_kv, "o_proj", None)
            _slice(block.self_attn, ("q_proj",), of_q, "o_proj", of_q)
        if channels is not None:
            kept = channels[number]
            _slice(block.mlp, ("gate_proj", "up_proj"), kept, "down_proj", kept)
    if kv is not None:
        keep = len(kv[0])
        config.head_dim = size
        config.num_attention_heads, config.num_key_value_heads = keep * heads // groups, keep
    if channels is not None:
        config.intermediate_size = len(channels[0])
    _check_stock(model)
    return model


def _spread(kept: Tensor, each: int) -> Tensor:
    return (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()


def _slice(
    part: Any, inner: Sequence[str], rows: Tensor, outer: str, columns: Tensor | None
) -> None:
    """Keep some rows of the inner projections of a sub-block, and columns of its outer one."""
    for name in inner:
        old = getattr(part, name)
        bias = None if old.bias is None else old.bias[rows]
        setattr(part, name, _linear(old.weight[rows], bias, old))
    if columns is not None:
        old = getattr(part, outer)
        setattr(part, outer, _linear(old.weight[:, columns], old.bias, old))


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous(), requires_grad=like.weight.requires_grad)
    return new.train(like.training)


def _check_stock(model: Any) -> None:
    """Raise ValueError where a model made from the new config has other shapes."""
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    ours, stock = ({n: p.shape for n, p in m.named_parameters()} for m in (model, fresh))
    wrong = sorted(n for n in ours.keys() | stock.keys() if ours.get(n) != stock.get(n))
    if wrong:
        raise ValueError(
            f"the config of a {type(model).__name__} cannot say these widths: {wrong[0]} is "
            f"{tuple(ours.get(wrong[0], ()))}, a stock model has {tuple(stock.get(wrong[0], ()))}"
        )
