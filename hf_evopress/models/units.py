"""The compressible parts of a model: linear weights inside its decoder blocks.

Names are module paths, found by walking the module tree, so any decoder of transformers works
without a table of architectures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base.patterns import matches
from .plain import shape_of, stock_linears

Stack = tuple[str, Sequence[nn.Module]]  # path of a list of blocks, and the blocks

SUPPORTED = (
    "decoder-only transformers models whose blocks hold nn.Linear layers, such as Llama, "
    "Mistral, Qwen, Gemma, Phi, SmolLM, OPT, GPT-2, GPT-NeoX and Falcon"
)
_CHOOSING = "Indexer"  # picks the tokens that attention sees: as a router, never compressed
_MAMBA = "MambaMixer"  # reads the weight of its dt_proj without calling it
_MIXING = "AltUp"  # Gemma 3n's clamps the weights of its few coefficients as it runs
_ROUTERS = ("gate", "router", "shared_expert_gate", "shared_gate")


@dataclass(frozen=True)
class Unit:
    """One compressible part: its module path, (out, in) shape and decoder block number.

    role: linear, or one of a model's ends (see `ends`): embedding, in block -1; head, in the
    block after the last; tied, the embedding whose weight is the head's as well.
    """

    name: str
    shape: tuple[int, int]
    block: int
    role: str = "linear"

    @property
    def is_end(self) -> bool:
        return self.role != "linear"

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the module path and the list of the decoder blocks of a causal language model.

    The list is the shallowest nn.ModuleList of the (text) decoder that has as many entries as
    the config has hidden layers. Raises ValueError for a model without one.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config; supported: {SUPPORTED}")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, of two stacks of blocks, which "
            "compress, search, evaluate and apply can do, and this cannot; supported here: "
            f"{SUPPORTED}"
        )
    text = config.get_text_config(decoder=True)
    n_layers = getattr(text, "num_hidden_layers", None)
    decoder: nn.Module = getattr(model, "get_decoder", lambda: model)()
    inside = {id(module) for module in decoder.modules()}
    every = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    lists = [entry for entry in every if len(entry[1]) == n_layers]
    if not lists:  # the decoder of an encoder-decoder alone, whose config counts the encoder's
        lists = [entry for entry in every if len(entry[1]) == getattr(text, "decoder_layers", 0)]
    # ModernBERT calls its head the decoder: then any list will do
    found = [entry for entry in lists if id(entry[1]) in inside] or lists
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no list of {n_layers} decoder blocks; "
            f"supported: {SUPPORTED}"
        )
    return min(found, key=lambda item: item[0].count("."))


def find_stacks(model: nn.Module) -> list[Stack]:
    """Return path and blocks of each stack of a model: of an encoder-decoder two, else one."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [find_blocks(model)]  # type: ignore[list-item]
    names = {id(module): name for name, module in model.named_modules()}
    found: list[Stack] = []
    for part in ("encoder", "decoder"):
        stack = getattr(model, f"get_{part}", lambda: model)()
        lists = [
            (name, module)
            for name, module in stack.named_modules()
            if isinstance(module, nn.ModuleList) and stack is not model
        ]
        if not lists:
            raise ValueError(f"{type(model).__name__} has no list of blocks in its {part}")
        best = min(lists, key=lambda item: (item[0].count("."), -len(item[1])))[1]
        found.append((names[id(best)], list(best)))
    return found


def all_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return path and module of every block, those of an encoder before those of its decoder."""
    return [
        (f"{path}.{i}", block)
        for path, blocks in find_stacks(model)
        for i, block in enumerate(blocks)
    ]


def find_units(
    model: nn.Module, *, skip: Sequence[str] = (), in_stock_form: bool = False
) -> list[Unit]:
    """Return the linear weights inside the decoder blocks, in module order.

    `skip` are globs ("*.v_proj", "model.layers.0.*") or regular expressions ("re:...") on
    module paths. Embeddings, the output head, routers, indexers of sparse attention, tied weights,
    and layers whose weight is read without a call (inside nn.MultiheadAttention, Mamba's dt_proj)
    or changed by the model (Gemma 3n's AltUp) are never units. in_stock_form: take layers of other
    classes (Conv1D) too, for their names and shapes, where a model in its plain form is not needed.
    """
    tied = {key.removesuffix(".weight") for key in getattr(model, "all_tied_weights_keys", ())}
    routed = _expert_counts(model)
    units = []
    for i, (path, block) in enumerate(all_blocks(model)):
        others = stock_linears(block) if in_stock_form else {}
        for name, linear in _linears(block, path, others):
            if name in tied or _is_router(name, linear, routed):
                continue
            units.append(Unit(name, shape_of(linear), i))
    if not units:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear inside its decoder blocks; "
            f"supported: {SUPPORTED}"
        )
    kept = [u for u in units if not any(matches(u.name, pattern) for pattern in skip)]
    if not kept:
        raise ValueError(f"skip={list(skip)} leaves none of the {len(units)} units to compress")
    return kept


def unmatched(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the globs and regular expressions that match no module of `model` by its path."""
    names = [name for name, _ in model.named_modules()]
    return [p for p in patterns if not any(matches(name, p) for name in names)]


def linear_layers(model: nn.Module) -> list[str]:
    """Return the paths of the linear layers in the decoder blocks, those of any quantizer too.

    What an adapter may be put on. Left out are routers, and layers that are read without a call.
    """
    routed = _expert_counts(model)
    return [
        name
        for path, block in all_blocks(model)
        for name, module in _called(block, path)
        if isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        and not _is_router(name, module, routed)
    ]


def check_weights_stay(model: nn.Module) -> None:
    """Raise ValueError for a model that changes weights of its layers as it runs: RWKV."""
    if every := getattr(getattr(model, "config", None), "rescale_every", None):
        raise ValueError(
            f"{type(model).__name__} with rescale_every={every} halves weights in place as it "
            "runs, which packed ones cannot be: set rescale_every to 0 in its config.json; it "
            "computes the same then, but for overflow in float16"
        )


def _linears(
    block: nn.Module, path: str, taken: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear modules of one block with their full paths; those in stock form if taken."""
    if not taken and (others := stock_linears(block)):
        name, module = next(iter(others.items()))
        raise ValueError(
            f"{path}.{name} is a {type(module).__name__}: bring the model into its plain form "
            "first, hf_evopress.models.plain.make_plain(model)"
        )
    for name, module in _called(block, path):
        if is_linear(module) or name.removeprefix(f"{path}.") in taken:
            yield name, module  # type: ignore[misc]


def _called(block: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of one block with their full paths, without those not ours to change."""
    closed: list[str] = []
    for name, module in block.named_modules(prefix=path):
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention) or kind.endswith((_CHOOSING, _MIXING)):
            closed.append(f"{name}.")
        if kind.endswith(_MAMBA):
            closed.append(f"{name}.dt_proj")
        if not any(name.startswith(prefix) for prefix in closed):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a plain nn.Linear or one of our packed ones.

    Other subclasses (bitsandbytes, ...) hold weights in forms of their own.
    """
    kind = type(module)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    return kind is nn.Linear or (ours and issubclass(kind, nn.Linear))


def _expert_counts(model: nn.Module) -> set[int]:
    """Return the widths a router of this model may have."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return {int(n) for key in keys if (n := getattr(config, key, None))} | {1}


def _is_router(name: str, linear: Any, widths: set[int]) -> bool:
    own = name.split(".")[-2:]  # that of Switch is called router.classifier
    return any(part in _ROUTERS for part in own) and shape_of(linear)[0] in widths
