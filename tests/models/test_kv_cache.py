"""Settings of the key-value cache: exact bytes, and the effect that a real cache has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_evopress import GearCache
from hf_evopress.loading.kv_cache.cache import GearLayer
from hf_evopress.models.kv_cache import (
    MENU,
    cache_level,
    cache_menus,
    cache_settings,
    cached_forward,
    find_caches,
    gear_of,
    known_from,
    stored,
)
from hf_evopress.models.patching import patched
from hf_evopress.plans.level import DENSE
from hf_evopress.scoring.cached import through_cache

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 64,
}  # fmt: skip
IDS = torch.arange(1, 201)[None] % 97
GEAR = "kv:rank=2,bits=3,group_size=32,outliers=0.05"


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3", "phi3", "gemma3_text"])
@pytest.mark.parametrize("setting", ["kv:bits=2,group_size=64", GEAR])
def test_the_effect_is_that_of_a_cache_read_buffer_by_buffer(
    arch: str, setting: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(arch)
    caches = [cache for cache in find_caches(model) if cache.window is None]
    levels = {cache.name: cache_level(setting) for cache in caches[:2]}
    forwards = {c.attention: cached_forward(model, c.name, levels[c.name]) for c in caches[:2]}
    gears = cache_settings(model, levels)

    def fresh() -> GearCache:
        cache = GearCache(model.config, bits=16)
        cache._set(gears)
        return cache

    with torch.no_grad():
        dense = model(input_ids=IDS).logits
        with patched(model, forwards):
            found = model(input_ids=IDS).logits
        read = through_cache(model, fresh, step=64)(IDS)
    effect = float((found - dense).abs().max())
    assert effect > 1e-3
    assert float((found - read).abs().max()) < 1e-2 * effect + 1e-5
    assert torch.equal(found[:, :64], dense[:, :64]) or torch.allclose(
        found[:, :64], dense[:, :64], atol=1e-5
    )


def test_no_token_sees_what_comes_after_it(trained_llama: nn.Module) -> None:
    model: Any = trained_llama
    cache = find_caches(model)[0]
    forward = cached_forward(model, cache.name, cache_level(MENU[-1]))
    other = torch.cat([IDS[:, :150], IDS[:, 150:].flip(1)], 1)
    with torch.no_grad(), patched(model, {cache.attention: forward}):
        a, b = (model(input_ids=ids).logits[:, :128] for ids in (IDS, other))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("setting", [*MENU, GEAR, "kv:bits=4,group_size=24"])
def test_the_cost_is_what_a_cache_holds(setting: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    n_layers = model.config.num_hidden_layers
    held = GearCache(model.config, levels=[setting] * n_layers)
    buffer = gear_of(cache_level(setting)).buffer if setting != "dense" else 64
    with torch.no_grad():
        through_cache(model, lambda: held, step=buffer)(IDS)
    said = sum(c.cost_bits(cache_level(setting), IDS.shape[1]) for c in find_caches(model))
    assert 8 * held.nbytes == said


def test_caches_are_found_without_weights(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gemma3_text")
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    caches = find_caches(skeleton)
    assert caches == find_caches(model)
    sliding = [cache for cache in caches if cache.window is not None]
    assert len(sliding) == 2 and len(caches) == 3
    assert sliding[0].cost_bits(DENSE, 10**6) == sliding[0].cost_bits(DENSE, 10**7)
    menus = cache_menus(caches)
    assert [len(menus[cache.name]) for cache in caches] == [1, 5, 1]


def test_models_whose_cache_cannot_be_set_are_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="takes alibi, cannot be searched"):
        find_caches(tiny_model("falcon", alibi=True))
    with pytest.raises(ValueError, match="BertForMaskedLM has no key-value cache"):
        find_caches(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))
    model = tiny_model("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="of an encoder-decoder"):
        find_caches(model)


def test_settings_have_one_spelling() -> None:
    assert str(cache_level("kv:group_size=64,bits=4,rank=0,outliers=0")) == MENU[2]
    assert str(cache_level("kv:bits=4")) == MENU[2]
    assert cache_level("dense") == DENSE
    for wrong, told in [
        ("rtn:bits=4,group_size=64", "a setting of the key-value cache is dense, or such as kv"),
        ("kv:bits=4,groups=64", "no parameter 'groups'.*group_size"),
        ("kv:bits=9", "a cache takes 1 to 8 bits"),
        ("kv:bits=4,group_size=0", "group_size is a multiple of 8"),
        ("kv:bits=four", "bits of a key-value cache is a number, got 'four'"),
        ("kv", "such as kv"),
    ]:
        with pytest.raises(ValueError, match=told):
            cache_level(wrong)


def test_losses_of_many_bits_follow_from_those_of_few() -> None:
    levels = [cache_level(text) for text in (*MENU, GEAR, "kv:bits=5,group_size=32")]
    found = known_from(levels)
    dense, eight, four, three, two, gear, other = levels
    assert found[dense] == (dense, 0.0)
    assert found[three] == (three, 1.0) and found[two] == (two, 1.0) and found[gear] == (gear, 1.0)
    assert found[four] == (three, (7 / 15) ** 2) and found[eight] == (three, (7 / 255) ** 2)
    assert found[other] == (other, 1.0)  # no other of such groups


def test_an_error_is_as_large_as_a_step() -> None:
    X = torch.randn(2, 3, 256, 16, generator=torch.Generator().manual_seed(0))
    three, four = (
        float((stored(X, gear_of(cache_level(f"kv:bits={b}")), is_key=True) - X).square().sum())
        for b in (3, 4)
    )
    assert four / three == pytest.approx((7 / 15) ** 2, rel=0.1)


def test_a_plan_may_name_the_modules_of_the_base_model(trained_llama: nn.Module) -> None:
    level = cache_level(MENU[3])
    inner: Any = trained_llama.model
    assert cache_settings(inner, {"model.layers.1.self_attn.kv_cache": level}) == {
        1: gear_of(level)
    }
    with pytest.raises(ValueError, match="layers.9.self_attn.kv_cache, which is no cache"):
        cache_settings(trained_llama, {"model.layers.9.self_attn.kv_cache": level})


def test_each_layer_of_a_cache_has_its_setting(trained_llama: nn.Module) -> None:
    n = trained_llama.config.num_hidden_layers
    cache = GearCache(trained_llama.config, levels=["dense", *[GEAR] * (n - 1)])
    assert [isinstance(layer, GearLayer) for layer in cache.layers] == [False, *[True] * (n - 1)]
    with pytest.raises(ValueError, match=f"levels is one for each of {n} layers; got 1"):
        GearCache(trained_llama.config, levels=["dense"])
