"""GearCache: a cache of transformers that holds keys and values in a few bits.

    cache = GearCache(model.config, bits=2)
    model.generate(**prompt, past_key_values=cache)     # or cache_implementation="gear"
    cache.nbytes                                        # what it holds, buffers and all

A model whose plan was made with a budget of memory (`--context`) has a setting for each layer:
generate takes them by itself, and GearCache.of(model) returns an empty cache with them.

Tokens wait in a buffer at full precision until there are enough of them; then they become a chunk.
A forward pass sees its own keys and values as they are and those of before as they are stored, as
in transformers' own quantised caches. Layers of another kind than full attention keep their cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...methods.maths.gear import DENSE_BITS, Gear, State, chunk_bytes, compress, decompress
from ...models.kv_cache import cache_level, cache_settings, gear_of
from ...plans.plan import Plan


@dataclass(frozen=True)
class Chunk:
    """Compressed keys or values of neighbouring tokens, and what they were."""

    state: State
    shape: torch.Size
    dtype: torch.dtype
    is_key: bool

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Chunk:
        """Return the chunk with all tensors changed along their first axis, the batch."""
        state = {name: change(tensor) for name, tensor in self.state.items()}
        batch = state["codes"].shape[0]
        return Chunk(state, torch.Size((batch, *self.shape[1:])), self.dtype, self.is_key)


class GearLayer(DynamicLayer):
    """The cache of one attention layer; `keys` and `values` are the buffer of its last tokens."""

    is_croppable = True

    def __init__(self, gear: Gear) -> None:
        super().__init__()
        self.gear = gear
        self.chunks: list[tuple[Chunk, Chunk]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with an empty buffer of the states' shape."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values, the new ones among them, and keep them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], -2)
        self.values = torch.cat([self.values, value_states], -2)
        keys, values = self.everything()
        self._compress()
        return keys, values

    def everything(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all tokens, as they are stored."""
        keys = [self._unpacked(key) for key, _ in self.chunks]
        values = [self._unpacked(value) for _, value in self.chunks]
        if not keys:
            return self.keys, self.values
        return torch.cat([*keys, self.keys], -2), torch.cat([*values, self.values], -2)

    def get_seq_length(self) -> int:
        """Return the number of tokens, compressed or not."""
        waiting = self.keys.shape[-2] if self.is_initialized else 0
        return self._n_compressed() + waiting

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; a chunk that is cut goes back to the buffer."""
        length = self.get_seq_length()
        wanted = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if not self.is_initialized or wanted >= length:
            return
        while self.chunks and self._n_compressed() > wanted:
            key, value = self.chunks.pop()
            self.keys = torch.cat([self._unpacked(key), self.keys], -2)
            self.values = torch.cat([self._unpacked(value), self.values], -2)
        left = max(0, wanted) - self._n_compressed()
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

    def reset(self) -> None:
        """Forget everything."""
        self.chunks = []
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences of a batch into another order."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences of the batch."""
        self._map(lambda t: t[indices])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        self._map(lambda t: t.to(self.device, non_blocking=True))

    @property
    def nbytes(self) -> int:
        """The bytes of all that is held."""
        if not self.is_initialized:
            return 0
        tensors = [t for pair in self.chunks for c in pair for t in c.state.values()]
        return sum(t.numel() * t.element_size() for t in (*tensors, self.keys, self.values))

    def _compress(self) -> None:
        n = self.keys.shape[-2] // self.gear.buffer * self.gear.buffer
        if n == 0:
            return
        pair = []
        for states, is_key in ((self.keys, True), (self.values, False)):
            part = states[..., :n, :]
            state = compress(part, self.gear, is_key=is_key)
            pair.append(Chunk(state, part.shape, part.dtype, is_key))
        self.chunks.append((pair[0], pair[1]))
        # copies: a view would keep the whole in memory
        self.keys, self.values = self.keys[..., n:, :].clone(), self.values[..., n:, :].clone()

    def _unpacked(self, chunk: Chunk) -> Tensor:
        return decompress(chunk.state, chunk.shape, chunk.dtype, self.gear, is_key=chunk.is_key)

    def _n_compressed(self) -> int:
        return sum(key.shape[-2] for key, _ in self.chunks)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.chunks = [(key.mapped(change), value.mapped(change)) for key, value in self.chunks]
        self.keys, self.values = change(self.keys), change(self.values)


class GearCache(DynamicCache):
    """The cache of a model whose config is given, each full-attention layer in `bits` bits.

    bits: one number, or one for each layer; 16 leaves a layer as it is, and GearCache(config,
    bits=16) is transformers' DynamicCache to the bit. The other settings are those of `Gear`.
    levels: instead of all these, a setting for each layer, such as kv:bits=4,group_size=64.

    >>> cache = GearCache(model.config, bits=4)
    >>> model(input_ids=ids, past_key_values=cache)
    """

    def __init__(
        self,
        config: Any,
        *,
        bits: int | Sequence[int] = 4,
        group_size: int = 64,
        rank: int = 4,
        outliers: float = 0.02,
        buffer: int = 64,
        levels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(config=config)
        if levels is None:
            settings = {
                "group_size": group_size,
                "rank": rank,
                "outliers": outliers,
                "buffer": buffer,
            }
            gears = [
                Gear(bits=n_bits, **settings)  # type: ignore[arg-type]
                for n_bits in bits_of_layers(bits, len(self.layers))
            ]
        else:
            gears = [gear_of(cache_level(level)) for level in levels]
            _check_length("levels", gears, len(self.layers))
        self._set(dict(enumerate(gears)))

    @classmethod
    def of(cls, model: Any) -> GearCache:
        """Return an empty cache with the settings that the plan of a compressed model has.

        >>> model.generate(**prompt, past_key_values=GearCache.of(model))
        """
        cache, plan = cls(model.config, bits=DENSE_BITS), planned(model)
        cache._set({} if plan is None else cache_settings(model, plan.cache))
        return cache

    def _set(self, gears: Mapping[int, Gear]) -> None:
        for number, gear in gears.items():
            if not gear.is_dense and type(self.layers[number]) is DynamicLayer:
                self.layers[number] = GearLayer(gear)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        for layer in self.layers:
            keys, values = layer.keys, layer.values
            if isinstance(layer, GearLayer) and layer.is_initialized:
                keys, values = layer.everything()
            yield keys, values, getattr(layer, "_sliding_window_tensor", None)

    @property
    def nbytes(self) -> int:
        """The bytes that the cache holds, of all layers."""
        return sum(_held(layer) for layer in self.layers)

    @staticmethod
    def bytes_at(
        config: Any,
        n_tokens: int,
        *,
        bits: int | Sequence[int] = 4,
        batch: int = 1,
        dense_bytes: int = 2,
        **settings: Any,
    ) -> int:
        """Return the bytes of a cache that was filled with a prompt of n_tokens tokens at once.

        dense_bytes: of a number in the buffer and in layers of 16 bits.
        """
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        total = 0
        for n_bits in bits_of_layers(bits, text.num_hidden_layers):
            gear = Gear(bits=n_bits, **settings)
            n = 0 if gear.is_dense else n_tokens // gear.buffer * gear.buffer
            total += 2 * batch * heads * (n_tokens - n) * channels * dense_bytes
            if n:
                shape = (batch, heads, n, channels)
                total += sum(chunk_bytes(shape, gear, is_key=is_key) for is_key in (True, False))
        return total


def bits_of_layers(bits: int | Sequence[int], n_layers: int) -> list[int]:
    """Return the bits of each layer, or raise ValueError for another number of them."""
    if isinstance(bits, int):
        return [bits] * n_layers
    _check_length("bits", bits, n_layers)
    return [int(n) for n in bits]


def planned(model: Any) -> Plan | None:
    """Return the plan of a compressed model that has settings for the cache, else None."""
    quantizer = getattr(model, "hf_quantizer", None)
    plan = getattr(getattr(quantizer, "quantization_config", None), "plan", None)
    return plan if isinstance(plan, Plan) and plan.cache else None


def _check_length(name: str, given: Sequence[Any], n_layers: int) -> None:
    if len(given) != n_layers:
        what = f"one number ({DENSE_BITS} leaves a layer as it is), or " if name == "bits" else ""
        raise ValueError(f"{name} is {what}one for each of {n_layers} layers; got {len(given)}")


def _held(layer: Any) -> int:
    if isinstance(layer, GearLayer):
        return layer.nbytes
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
