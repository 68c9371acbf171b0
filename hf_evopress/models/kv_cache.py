"""The key-value cache of attention layers: its settings, their exact bytes, and their effect.

A setting is a level of `<attention layer>.kv_cache`, which holds no weights:

    dense                                        keys and values as they come, in 16 bits
    kv:bits=4,group_size=64                      codes, a scale and a minimum per group
    kv:rank=4,bits=2,group_size=64,outliers=0.02 GEAR: also a term of low rank and outliers

A cache compresses full buffers of tokens; those that wait for theirs to fill are in 16 bits. What a
setting does to a text is computed in one forward pass: each token attends to the tokens of its own
buffer as they are and to those of buffers before it as they are stored. A cache that is read one
buffer at a time gives the same. A prompt that is read at once attends to itself as it is, so there
the loss is smaller; a token that is generated attends as here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..base.plugins import did_you_mean
from ..methods.maths.gear import DENSE_BITS, HALF_BYTES, Gear, chunk_bytes, compress, decompress
from ..plans.level import DENSE, Level, Term
from .sub_blocks import find_sub_blocks, layer_idx

SUFFIX = ".kv_cache"
MENU = ("dense", *(f"kv:bits={bits},group_size=64" for bits in (8, 4, 3, 2)))
BUFFER = 64  # tokens at least
MEASURED = 3  # bits

_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")  # of attention layers
_POSITIONS = ("alibi", "position_bias")  # which are added per key, outside of the mask
_PARAMS = ("bits", "group_size", "rank", "outliers")


@dataclass(frozen=True)
class CacheUnit:
    """The cache of one attention layer: keys and values of `heads` heads, per token.

    window: how many tokens it holds at most, of attention that slides; such caches stay dense.
    """

    name: str
    block: int
    heads: int
    key_channels: int
    value_channels: int
    window: int | None = None

    @property
    def attention(self) -> str:
        """The module path of the attention layer."""
        return self.name.removesuffix(SUFFIX)

    def cost_bits(self, level: Level, context: int) -> int:
        """Return the bits that are held of `context` tokens of one sequence, in 16-bit dtypes."""
        gear, n = gear_of(level), min(context, self.window or context)
        chunks = 0 if gear.is_dense else n // gear.buffer
        channels = ((self.key_channels, True), (self.value_channels, False))
        waiting = (n - chunks * gear.buffer) * self.heads * sum(c for c, _ in channels) * HALF_BYTES
        packed = sum(
            chunk_bytes((1, self.heads, gear.buffer, c), gear, is_key=is_key)
            for c, is_key in (channels if chunks else ())
        )
        return 8 * (waiting + chunks * packed)


def cache_level(text: str | Level) -> Level:
    """Return a setting in its canonical spelling, or raise ValueError."""
    level = Level.parse(text)
    if level.is_dense:
        return level
    term, params = level.terms[0], level.terms[0].kwargs
    if len(level.terms) > 1 or term.method != "kv" or "bits" not in params:
        raise ValueError(
            f"a setting of the key-value cache is dense, or such as {MENU[2]}; got {str(text)!r}"
        )
    for key in params:
        if key not in _PARAMS:
            raise ValueError(
                f"kv has no parameter {key!r}{did_you_mean(key, list(_PARAMS))}: {text}"
            )
    known = {k: v for k, v in params.items() if v or k not in ("rank", "outliers")}
    level = Level((Term.of("kv", **{"group_size": 64, **known}),))
    gear_of(level)
    return level


@lru_cache(maxsize=256)
def gear_of(level: Level) -> Gear:
    """Return the numbers that a setting stands for."""
    if level.is_dense:
        return Gear(bits=DENSE_BITS)
    params: dict[str, Any] = {"rank": 0, "outliers": 0.0, **level.terms[0].kwargs}
    size = params["group_size"]
    for key, value in params.items():
        if type(value) is not int and (key != "outliers" or type(value) is not float):
            raise ValueError(f"{key} of a key-value cache is a number, got {value!r} in {level}")
    return Gear(**params, buffer=size * max(1, ceil(BUFFER / max(1, size))))


def known_from(levels: Sequence[Level]) -> dict[Level, tuple[Level, float]]:
    """Return setting -> the one whose loss is to be measured, and that loss's factor.

    Errors are as large as a step, and losses as their square, once there are enough bits: on
    SmolLM2 those at 4 bits are 0.19 of those at 3 (0.22 by steps), at 8 bits 0.0035 of those at 4
    (0.0035), the median of 30 layers. So settings of more than MEASURED bits follow from others.
    """
    found: dict[Level, tuple[Level, float]] = {}
    for level in levels:
        gear = gear_of(level)
        near = [
            (other.bits, x)
            for x in levels
            for other in [gear_of(x)]
            if not gear.is_dense
            and other.bits <= MEASURED
            and replace(other, bits=gear.bits) == gear
        ]
        source = level
        if gear.bits > MEASURED and near:
            bits, source = max(near, key=lambda pair: pair[0])
            found[level] = source, ((2**bits - 1) / (2**gear.bits - 1)) ** 2
        else:
            found[level] = source, float(not gear.is_dense)
    return found


def find_caches(model: nn.Module) -> list[CacheUnit]:
    """Return the caches of a model, which may be on the meta device, by a pass over two tokens.

    Raises ValueError for models whose caches cannot be counted or compressed.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("the cache of an encoder-decoder cannot be part of a budget")
    kind = type(model).__name__
    cache, ids = DynamicCache(config=config), torch.zeros(1, 2, dtype=torch.long)
    known = inspect.signature(model.forward).parameters
    name = next((n for n in _ARGUMENTS if n in known), None)
    if name is None:
        raise ValueError(
            f"{kind} has no key-value cache that a budget could count: leave out the context"
        )
    try:
        with torch.no_grad():
            given: dict[str, Any] = {name: cache, "use_cache": True}
            model(input_ids=ids.to(next(model.parameters()).device), **given)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the cache of {kind} cannot be counted: {error}") from error
    attention = {
        layer_idx(model.get_submodule(sub.name)): sub
        for sub in find_sub_blocks(model)
        if sub.kind == "attention"
    }
    found = []
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or number not in attention:
            raise ValueError(
                f"layer {number} of {kind} is a {type(layer).__name__}: a budget counts caches of "
                "attention layers only; leave the context out"
            )
        assert layer.keys is not None and layer.values is not None
        keys, values, sub = layer.keys.shape, layer.values.shape, attention[number]
        slides = getattr(layer, "sliding_window", None)
        window = None if slides is None else slides - 1
        made = CacheUnit(f"{sub.name}{SUFFIX}", sub.block, keys[1], keys[3], values[3], window)
        if window is None:
            _argument(model.get_submodule(sub.name), config)
        found.append(made)
    return found


def cache_menus(units: Sequence[CacheUnit], offered: Sequence[str] = ()) -> dict[str, list[Level]]:
    """Return the settings that each cache is offered, by default those of MENU."""
    levels = list(dict.fromkeys(cache_level(text) for text in offered or MENU))
    return {unit.name: [DENSE] if unit.window is not None else levels for unit in units}


def cache_settings(model: nn.Module, levels: Mapping[str, Level]) -> dict[int, Gear]:
    """Return layer number -> setting, for `levels` by the names of caches.

    A plan for the whole model also names the modules of its base model, and the other way round.
    """
    modules, found = dict(model.named_modules()), {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, level in levels.items():
        path = name.removesuffix(SUFFIX)
        paths = (path, path.removeprefix(prefix), prefix + path)
        module = next((modules[p] for p in paths if p in modules), None)
        number = None if module is None else layer_idx(module)
        if number is None or not name.endswith(SUFFIX):
            raise ValueError(f"the plan has a setting for {name}, which is no cache of this model")
        found[number] = gear_of(cache_level(level))
    return found


def cached_forward(model: nn.Module, unit: str, level: Level) -> Callable[..., Any]:
    """Return a forward for the attention layer of a cache whose keys and values are stored."""
    module: Any = model.get_submodule(unit.removesuffix(SUFFIX))
    name, gear = _argument(module, model.config), gear_of(level)
    used = getattr(model.config, "_attn_implementation", "eager")
    if used not in ("sdpa", "eager"):
        raise ValueError(
            f"the effect of a cache is computed with sdpa or eager attention, not {used}: load "
            'the model with attn_implementation="sdpa"'
        )
    forward = module.forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        hidden = given["hidden_states"]
        given["attention_mask"] = _in_buffers(given.get("attention_mask"), hidden, gear.buffer)
        given[name] = _Stored(gear)
        return forward(*bound.args, **bound.kwargs)

    return run


class _Stored:
    """Takes the place of a cache: returns keys and values as they are stored and as they are."""

    def __init__(self, gear: Gear) -> None:
        self.gear = gear

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return (
            torch.cat([stored(keys, self.gear, is_key=True), keys], -2),
            torch.cat([stored(values, self.gear, is_key=False), values], -2),
        )

    def get_seq_length(self, *args: Any) -> int:
        return 0


def stored(X: Tensor, gear: Gear, *, is_key: bool) -> Tensor:
    """Return keys or values (batch, heads, tokens, channels) after one buffer after another.

    Tokens of a last buffer that is not full are as they were.
    """
    n = X.shape[-2] // gear.buffer * gear.buffer
    if n == 0:
        return X
    chunks = X[..., :n, :].unflatten(-2, (-1, gear.buffer)).transpose(1, 2)
    many = chunks.flatten(0, 1)  # a batch of buffers
    state = compress(many, gear, is_key=is_key)
    made = decompress(state, many.shape, X.dtype, gear, is_key=is_key)
    made = made.view(chunks.shape).transpose(1, 2).flatten(2, 3)
    return torch.cat([made, X[..., n:, :]], -2)


def _in_buffers(mask: Tensor | None, hidden: Tensor, buffer: int) -> Tensor:
    """Return the mask (batch or 1, 1, n, 2 n) to keys as stored, then to keys as they are."""
    n = hidden.shape[1]
    number = torch.arange(n, device=hidden.device)
    if mask is None:
        mask = (number[:, None] >= number)[None, None]
    number = number // buffer
    is_near = number[:, None] == number
    mask = mask[..., :n]
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)
    least = torch.finfo(mask.dtype).min
    return torch.cat([mask.masked_fill(is_near, least), mask.masked_fill(~is_near, least)], -1)


def _argument(module: nn.Module, config: Any) -> str:
    """Return what an attention layer calls its cache; ValueError where it cannot be compressed."""
    names = inspect.signature(module.forward).parameters
    found = next((name for name in _ARGUMENTS if name in names), None)
    biased = [name for name in _POSITIONS if name in names and getattr(config, name, True)]
    if found is None or biased or not {"attention_mask", "hidden_states"} <= {*names}:
        why = f"takes {biased[0]}" if biased else "takes no mask and cache"
        raise ValueError(
            f"the cache of {type(module).__name__}, which {why}, cannot be searched; leave the "
            "context out"
        )
    return found


def cache_argument(model: Any) -> str:
    """Return what forward calls its cache: `cache` from transformers 5.20 or so on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
