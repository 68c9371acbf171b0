"""The attention and MLP sub-blocks of a model: which can be dropped, and what that frees.

Found by walking the module tree and reading the source of the blocks' forward, so any decoder
of transformers with separable sub-blocks works without a table of architectures.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn

from ..plans.level import DROP
from .units import Unit, all_blocks, find_blocks, find_units

Kind = Literal["attention", "mlp"]
Forward = Callable[..., Any]
KINDS: tuple[Kind, ...] = ("attention", "mlp")

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn|moe|experts", re.IGNORECASE)
_OTHER = re.compile(r"cross|linear|lightning|mamba|delta|router|norm", re.IGNORECASE)


@dataclass(frozen=True)
class SubBlock:
    """One residual branch of a decoder block: a module path, and the linear units inside it.

    n_outputs: the length of the tuple that the block unpacks from it, 0 for a bare tensor.
    """

    name: str
    block: int
    kind: Kind
    units: tuple[str, ...]
    n_outputs: int


def find_sub_blocks(model: nn.Module) -> list[SubBlock]:
    """Return the sub-blocks of `model` that can be dropped, in module order.

    A sub-block is a module of its own inside a decoder block, so OPT, whose MLP is spread over
    its blocks, offers attention only, and linear attention or state-space layers are not
    offered. Neither is attention whose keys and values later layers share (Gemma 3n), nor anything
    of an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):  # type: ignore[union-attr]
        return []
    path, blocks = find_blocks(model)
    units = find_units(model, in_stock_form=True)
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    shares = bool(getattr(config, "num_kv_shared_layers", 0))
    found = []
    for number, block in enumerate(blocks):
        for child, module in block.named_children():
            kind = _kind(module)
            if kind is None or (kind == "attention" and shares):
                continue
            n_outputs = _n_outputs(type(block).forward, child, type(module).forward)
            if n_outputs is None:
                continue
            name = f"{path}.{number}.{child}"
            inside = tuple(u.name for u in units if u.name.startswith(f"{name}."))
            found.append(SubBlock(name, number, kind, inside, n_outputs))
    return found


def layer_idx(module: nn.Module) -> int | None:
    """Return the number of the cache layer that an attention module writes to."""
    for part in module.modules():
        number = getattr(part, "layer_idx", None)
        if isinstance(number, int):
            return number
    return None


def _kind(module: nn.Module) -> Kind | None:
    name = type(module).__name__
    if _OTHER.search(name) or not any(p.ndim >= 2 for p in module.parameters()):
        return None
    if _ATTENTION.search(name):
        return "attention" if layer_idx(module) is not None else None
    return "mlp" if _MLP.search(name) else None


@lru_cache(maxsize=None)
def _n_outputs(block: Forward, child: str, module: Forward) -> int | None:
    """Return the length of the tuple that a block expects of `self.<child>(...)`, 0 for a tensor.

    Read from the source: how the block unpacks the call, else what the module returns. None
    where the block's forward has no such call, or the module returns now this, now that.
    """
    calls = [
        parent
        for parent in ast.walk(_source(block))
        for node in ast.iter_child_nodes(parent)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{child}"
    ]
    if not calls:
        return None
    for parent in calls:
        if isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple):
            return len(parent.targets[0].elts)
    returned = [n.value for n in ast.walk(_source(module)) if isinstance(n, ast.Return)]
    sizes = {len(v.elts) if isinstance(v, ast.Tuple) else 0 for v in returned}
    return sizes.pop() if len(sizes) == 1 else None


@lru_cache(maxsize=None)
def _source(forward: Forward) -> ast.AST:
    try:
        text = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):  # made at run time: nothing to read
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(textwrap.dedent(text))


@dataclass(frozen=True)
class Droppable:
    """The genes that droppable sub-blocks add to a search space, as SearchSpace.build takes them.

    options: sub-block -> (level, cost in bits); `dense` means kept, and its cost is that of
    everything inside which is no unit of the search.
    inside: unit -> sub-block; blocks: sub-block -> decoder block.
    """

    options: dict[str, list[tuple[str, int]]]
    inside: dict[str, str]
    blocks: dict[str, int]

    @property
    def kept_bits(self) -> int:
        """The sum of the costs of keeping: bits to take out of the space's `fixed_bits`."""
        return sum(cost for options in self.options.values() for _, cost in options)

    def plan_levels(self, levels: Mapping[str, str]) -> dict[str, str]:
        """Return `levels` without kept sub-blocks, which are no units of a plan."""
        return {u: v for u, v in levels.items() if u not in self.options or str(v) == str(DROP)}

    def space_levels(self, levels: Mapping[str, str]) -> dict[str, str]:
        """Return the levels of a plan with kept sub-blocks written out, as the space has them."""
        return {**dict.fromkeys(self.options, "dense"), **levels}


def droppable(
    model: nn.Module,
    units: Sequence[Unit],
    *,
    kinds: Sequence[Kind] = KINDS,
    keep_first: int = 0,
    keep_last: int = 0,
) -> Droppable:
    """Return the sub-blocks that a search over `units` may drop.

    model: dense, in the dtype to ship; may be on the meta device. keep_first, keep_last: how
    many blocks at either end stay whole. Raises ValueError where nothing is left to drop.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"can drop {' and '.join(KINDS)}, not {kind!r}")
    n_blocks = len(all_blocks(model))
    chosen = [
        sub
        for sub in find_sub_blocks(model)
        if sub.kind in kinds and keep_first <= sub.block < n_blocks - keep_last
    ]
    if not chosen:
        two_stacks = getattr(model.config, "is_encoder_decoder", False)  # type: ignore[union-attr]
        why = "; those of an encoder-decoder stay whole: leave out drop" if two_stacks else ""
        raise ValueError(
            f"no sub-block of {type(model).__name__} can be dropped with kinds={list(kinds)}, "
            f"keep_first={keep_first} and keep_last={keep_last} of {n_blocks} blocks{why}"
        )
    options: dict[str, list[tuple[str, int]]] = {}
    inside: dict[str, str] = {}
    for sub in chosen:
        searched = [u.name for u in units if u.name.startswith(f"{sub.name}.")]
        inside.update(dict.fromkeys(searched, sub.name))
        tensors = model.get_submodule(sub.name).state_dict(prefix=f"{sub.name}.")
        weights = {f"{unit}.weight" for unit in searched}
        bits = sum(8 * tensor.nbytes for name, tensor in tensors.items() if name not in weights)
        options[sub.name] = [(str(DROP), 0), ("dense", bits)]
    return Droppable(options, inside, {sub.name: sub.block for sub in chosen})
