"""Physical removal of whole dropped blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.export.dense import DenseExport
from hf_evopress.export.pruned import PrunedExport
from hf_evopress.methods import compose
from hf_evopress.models.dropped import dropped_units, replace_dropped
from hf_evopress.models.sub_blocks import find_sub_blocks
from hf_evopress.plans.level import DROP
from hf_evopress.plans.plan import Plan

IDS = torch.arange(3, 19).view(2, 8)
TinyModel = Callable[..., Any]


def make_plan(model: Any, blocks: list[int], **more: str) -> Plan:
    levels = {sub.name: "drop" for sub in find_sub_blocks(model) if sub.block in blocks}
    return Plan({**levels, **more})


def no_states(unit: str, level: object) -> dict[str, torch.Tensor]:
    raise AssertionError(f"{unit} needs no packed tensors")


@pytest.mark.parametrize(
    "arch, blocks",
    [
        ("llama", [0]),
        ("qwen3", [1]),
        ("gpt_neox", [0]),
        ("phi3", [1]),
        ("mistral", [0]),
        ("gemma3_text", [0]),
        ("gemma3_text", [1]),
    ],
)
def test_a_stock_model_with_fewer_layers_computes_the_same(
    arch: str, blocks: list[int], tiny_model: TinyModel, tmp_path: Path
) -> None:
    reference, model = tiny_model(arch), tiny_model(arch)
    plan = make_plan(model, blocks)
    replace_dropped(reference, plan)
    folder = PrunedExport().save(model, plan, no_states, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == reference.config.num_hidden_layers - 1
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.allclose(loaded(IDS).logits, reference(IDS).logits, atol=1e-6)
    ours, theirs = (m.generate(IDS, max_new_tokens=10, pad_token_id=0) for m in (loaded, reference))
    assert torch.equal(ours, theirs)


def test_other_units_are_written_as_their_levels_decompress(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model, unit = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    level = compose.normalize("rtn:bits=4,group_size=32")
    W = model.get_submodule(unit).weight.detach().clone()
    state = compose.compress(level, W, None)
    plan = make_plan(model, [0], **{unit: str(level)})
    folder = PrunedExport().save(model, plan, lambda u, v: state, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    written = loaded.get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(written, compose.decompress(level, state, (128, 64), torch.float32))


def test_lists_per_layer_in_the_config_lose_their_entries(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("gemma3_text")
    PrunedExport().save(model, make_plan(model, [0]), no_states, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]


def test_half_dropped_blocks_are_refused_by_name(tiny_model: TinyModel, tmp_path: Path) -> None:
    plan = Plan({"model.layers.0.mlp": "drop", "model.layers.1.self_attn": "drop"})
    with pytest.raises(ValueError, match=r"only a part of 2: .*0\.mlp; .*1\.self_attn"):
        PrunedExport().save(tiny_model("llama"), plan, no_states, tmp_path / "out")
    plan = Plan({"model.decoder.layers.0.self_attn": "drop"})  # the MLP of OPT stays
    with pytest.raises(ValueError, match="only a part of 1"):
        PrunedExport().save(tiny_model("opt"), plan, no_states, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_without_or_with_nothing_but_drops_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    plan = Plan({"model.layers.0.mlp.up_proj": "rtn:bits=4,group_size=32"})
    with pytest.raises(ValueError, match="drops no block"):
        PrunedExport().save(model, plan, no_states, tmp_path / "out")
    with pytest.raises(ValueError, match="drops all 2 blocks"):
        PrunedExport().save(model, make_plan(model, [0, 1]), no_states, tmp_path / "out")


def test_a_dropped_block_that_scales_its_input_cannot_be_removed(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    block = model.model.layers[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"blocks \[0\] .* change the hidden states"):
        PrunedExport().save(model, make_plan(model, [0]), no_states, tmp_path / "out")


def test_blocks_that_depend_on_their_place_are_not_renumbered(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.scaling *= 2  # as if derived from the layer's number
    with pytest.raises(ValueError, match=r"blocks \[1\] depend on their place"):
        PrunedExport().save(model, make_plan(model, [0]), no_states, tmp_path / "out")


def test_the_dense_export_has_zero_weights_for_what_is_dropped(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    reference, model = tiny_model("qwen3"), tiny_model("qwen3")
    plan = Plan({"model.layers.0.mlp": "drop", "model.layers.1.self_attn": "drop"})
    assert replace_dropped(reference, dict.fromkeys(dropped_units(plan), DROP))
    folder = DenseExport().save(model, plan, no_states, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, reference(IDS).logits)


def test_a_corrected_bias_needs_a_bias_in_the_stock_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from hf_evopress.methods.maths.linalg import Stats

    level = compose.normalize("lowrank:rank=4,centred=true")
    for arch, unit in (
        ("llama", "model.layers.0.mlp.up_proj"),
        ("opt", "model.decoder.layers.0.fc1"),
    ):
        model = tiny_model(arch)
        linear = model.get_submodule(unit)
        x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) + 1
        stats = Stats(x.T @ x / 50, mean=x.mean(0), n_tokens=50)
        state = compose.compress(level, linear.weight.detach(), stats)
        run = compose.operator(level, state, linear.bias, (128, 64), torch.float32)
        wanted = run(x).detach().clone()
        plan, save = Plan({unit: str(level)}), DenseExport().save
        if arch == "llama":
            with pytest.raises(ValueError, match="corrects the bias"):
                save(model, plan, lambda u, v, state=state: state, tmp_path / arch)
            continue
        save(model, plan, lambda u, v, state=state: state, tmp_path / arch)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / arch).get_submodule(unit)
        assert torch.allclose(loaded(x), wanted, atol=1e-4)
