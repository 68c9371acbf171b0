"""GearCache in forward and generate: exact where it should be, near where it may be, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import hf_evopress
from hf_evopress import GearCache
from hf_evopress.loading.kv_cache.cache import GearLayer
from hf_evopress.models.dropped import replace_dropped
from hf_evopress.models.kv_cache import cache_argument
from hf_evopress.plans.level import Level

SMALL = {"group_size": 8, "buffer": 8, "rank": 2}
IDS = torch.arange(1, 61)[None]


def logits(model: Any, cache: Any, ids: Tensor = IDS, step: int = 20) -> Tensor:
    """Return the logits (n, vocabulary) of ids, a few tokens at a time."""
    name = cache_argument(model)
    pieces = []
    with torch.no_grad():
        for piece in ids.split(step, dim=1):
            pieces.append(model(input_ids=piece, use_cache=True, **{name: cache}).logits[0])
    return torch.cat(pieces)


@pytest.fixture
def model(trained_llama: nn.Module) -> Any:
    return trained_llama


def test_it_is_public() -> None:
    assert "GearCache" in hf_evopress.__all__


def test_sixteen_bits_are_the_stock_cache_to_the_bit(model: Any) -> None:
    full = logits(model, DynamicCache(config=model.config))
    assert torch.equal(logits(model, GearCache(model.config, bits=16)), full)


def test_more_bits_come_nearer_and_gear_nearer_than_plain_groups(model: Any) -> None:
    full = logits(model, DynamicCache(config=model.config)).log_softmax(-1)

    def kl(**settings: Any) -> float:
        found = logits(model, GearCache(model.config, **SMALL | settings)).log_softmax(-1)
        return float((full.exp() * (full - found)).sum(-1).mean())

    by_bits = [kl(bits=bits) for bits in (2, 4, 8)]
    assert by_bits[0] > by_bits[1] > by_bits[2] > 0
    assert kl(bits=2) < kl(bits=2, rank=0, outliers=0.0)


def test_what_is_held_is_what_bytes_at_says(model: Any) -> None:
    for settings in (SMALL | {"bits": 2}, SMALL | {"bits": [2, 16, 4]}, {"bits": 3, "rank": 0}):
        cache = GearCache(model.config, **settings)  # type: ignore[arg-type]
        logits(model, cache, step=60)
        said = GearCache.bytes_at(model.config, 60, dense_bytes=4, **settings)  # type: ignore[arg-type]
        assert cache.nbytes == said
    assert GearCache.bytes_at(model.config, 8192, bits=2) < 0.55 * GearCache.bytes_at(
        model.config, 8192, bits=16
    )


def test_tokens_wait_in_the_buffer_until_there_are_enough(model: Any) -> None:
    cache = GearCache(model.config, bits=4, **SMALL)  # type: ignore[arg-type]
    logits(model, cache, IDS[:, :11], step=1)
    layer: Any = cache.layers[0]
    assert isinstance(layer, GearLayer) and len(layer.chunks) == 1
    assert layer.keys.shape[-2] == 3 and cache.get_seq_length() == 11


def test_generate_takes_it_as_a_cache_and_by_name(model: Any) -> None:
    def text(**given: Any) -> list[int]:
        made = model.generate(IDS, max_new_tokens=20, do_sample=False, pad_token_id=0, **given)
        return made[0].tolist()

    name = cache_argument(model)
    settings: dict[str, Any] = SMALL | {"bits": 4}
    by_cache = text(**{name: GearCache(model.config, **settings)})
    by_name = text(cache_implementation="gear", cache_config=settings)
    assert by_cache == by_name and len(by_name) == 80
    assert text(cache_implementation="gear", cache_config={"bits": 16}) == text()
    with pytest.raises(ValueError, match="either a cache or"):
        text(cache_implementation="gear", **{name: GearCache(model.config)})
    with pytest.raises(TypeError, match="cache_config takes bits"):
        text(cache_implementation="gear", cache_config={"nbits": 4})


def test_other_names_are_still_refused_and_known_ones_work(model: Any) -> None:
    given = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match="gear"):
        model.generate(IDS, cache_implementation="gears", **given)
    assert model.generate(IDS, cache_implementation="dynamic", **given).shape[1] == 62


def test_beams_and_batches_are_those_of_the_full_cache_at_eight_bits(model: Any) -> None:
    batch = torch.cat([IDS, IDS.flip(1)])
    given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    given["attention_mask"] = torch.ones_like(batch)
    full = model.generate(batch, **given)
    near = model.generate(
        batch, **given, cache_implementation="gear", cache_config=SMALL | {"bits": 8}
    )
    assert torch.equal(full, near)


def test_cropping_leaves_what_was_there_before(model: Any) -> None:
    cache = GearCache(model.config, bits=8, **SMALL)  # type: ignore[arg-type]
    logits(model, cache, IDS[:, :30], step=30)
    before = [t.clone() for layer in cache.layers for t in layer.everything()]  # type: ignore[attr-defined]
    cache.crop(-13)
    assert cache.get_seq_length() == 17
    after = [t for layer in cache.layers for t in layer.everything()]  # type: ignore[attr-defined]
    assert all(torch.equal(a[..., :17, :], b) for a, b in zip(before, after, strict=True))
    cache.crop(0)
    assert cache.get_seq_length() == 17
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_a_batch_is_reordered_selected_and_repeated(model: Any) -> None:
    cache = GearCache(model.config, bits=4, **SMALL)  # type: ignore[arg-type]
    logits(model, cache, torch.cat([IDS, IDS.flip(1)])[:, :30], step=30)
    a, b = cache.layers[1].everything()[0].clone()  # type: ignore[attr-defined]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[1].everything()[0], torch.stack([b, a]))  # type: ignore[attr-defined]
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].everything()[0], torch.stack([a, a]))  # type: ignore[attr-defined]


def test_sliding_layers_keep_their_cache(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gemma3_text")
    cache = GearCache(model.config, bits=4, **SMALL)  # type: ignore[arg-type]
    kinds = [isinstance(layer, GearLayer) for layer in cache.layers]
    assert kinds == [False, True, False]
    full = logits(model, DynamicCache(config=model.config))
    assert (logits(model, cache) - full).abs().max() < 0.1 * full.abs().max()


def test_dropped_attention_counts_its_tokens(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()
    replace_dropped(model, {"model.layers.0.self_attn": Level.parse("drop")})
    cache = GearCache(model.config, bits=4, **SMALL)  # type: ignore[arg-type]
    full = logits(model, DynamicCache(config=model.config))
    found = logits(model, cache)
    assert cache.get_seq_length() == 60
    assert (found - full).abs().max() < 0.1 * full.abs().max()


def test_bits_are_one_number_or_one_per_layer(model: Any) -> None:
    with pytest.raises(ValueError, match="each of 3 layers"):
        GearCache(model.config, bits=[4, 4])
