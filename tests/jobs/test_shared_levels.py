"""Codes that two neighbouring layers have in common: searched, stored once, loaded as scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_evopress import EvoPressConfig
from hf_evopress.base.devices import using
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.loading.layers import compressed_layers
from hf_evopress.loading.neighbours import left_out
from hf_evopress.methods import compose
from hf_evopress.models.neighbours import neighbour, pairs, saved_bits, shared_tensors
from hf_evopress.models.size import model_size, stored_bytes
from hf_evopress.recipes.recipe import Recipe

from .. import second_device  # noqa: F401  registers the device

SHARED = "gptq:bits=4,group_size=32 + lowrank:rank=4,factors=int8,shared=true"
OWN = "gptq:bits=2,group_size=32"
SMALL = {"seq_len": 64, "calibration": 12, "search": 8, "heldout": 2, "test": 4}


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    said: dict[str, Any] = {
        "model": str(home / "dense"),
        "budget": {"bits": 4.4},
        "data": {"sources": [str(home / "text.txt")], **SMALL},
        "search": {"settings": {"generations": 1}, "sensitivity_tokens": 512},
        "levels": [OWN, SHARED],
        "pin": {"model.layers.[01].*": SHARED},
        "share": True,
        "out": str(home / out),
    }
    return Recipe.from_dict({**said, **changes})


@pytest.fixture(scope="module")
def made(home: Path) -> Any:
    return compress(recipe(home, "shared"), window=64)


def test_neighbours_are_even_and_odd_blocks_of_one_shape() -> None:
    assert neighbour("model.layers.2.mlp.up_proj") == "model.layers.3.mlp.up_proj"
    assert neighbour("model.layers.3.mlp.up_proj") == "model.layers.2.mlp.up_proj"
    assert neighbour("lm_head") is None
    units = {"m.0.a": (8, 8), "m.1.a": (8, 8), "m.2.a": (8, 8), "m.3.a": (8, 4)}
    assert pairs(units) == [("m.0.a", "m.1.a")]


def test_what_is_shared_is_stored_once(made: Any) -> None:
    plan = made.plan
    sharing = {u: plan.shapes[u] for u in plan if compose.n_shared(compose.normalize(plan[u]))}
    assert len(sharing) == 14 and all(".2." not in unit for unit in sharing)
    with safe_open(made.folder / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    assert "model.layers.0.mlp.up_proj.codes" in keys
    assert "model.layers.1.mlp.up_proj.codes" not in keys
    assert "model.layers.1.mlp.up_proj.A_codes_1" in keys
    assert stored_bytes(made.folder) <= plan.budget["checkpoint_bytes_at_most"]


def test_the_cost_is_that_of_the_layers_that_load(made: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    size = model_size(model)
    assert size.bits_per_weight == pytest.approx(made.plan.budget["bits_per_weight"], abs=1e-6)
    levels = {u: compose.normalize(level) for u, level in made.plan.items()}
    shapes = made.plan.shapes
    alone = sum(compose.cost_bits(levels[u], shapes[u]) for u in levels if ".layers." in u)
    assert size.unit_bits == alone - saved_bits(levels, shapes)
    layers = compressed_layers(model)
    first, second = (layers[f"model.layers.{n}.mlp.up_proj"] for n in (0, 1))
    assert first.state["codes"] is second.state["codes"]
    assert not torch.equal(first.weight, second.weight)


def test_saved_again_it_is_the_same_model(made: Any, tmp_path: Path) -> None:
    ids = torch.arange(1, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(made.folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, logits)
    dense = again.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, layer in compressed_layers(model).items():
        assert torch.equal(stock.get_submodule(name).weight, layer.weight)


def test_a_pair_that_is_shared_no_more_is_stored_apart(made: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    layers = compressed_layers(model)
    layer = layers["model.layers.1.mlp.up_proj"]
    assert "model.layers.1.mlp.up_proj.codes" in left_out(layers)
    layer._parameters["codes"] = torch.nn.Parameter(layer.state["codes"].clone(), False)
    assert "model.layers.1.mlp.up_proj.codes" not in left_out(layers)


def test_the_search_may_choose_to_share_or_not(home: Path) -> None:
    job = Job(recipe(home, "x", pin={}, budget={"bits": 3.4}))
    gene = next(g for g in job.space.genes if len(g.units) == 2)
    assert {option.level for option in gene.options} == {OWN, SHARED}
    shape = next(unit.shape for unit in job.units if unit.name == gene.units[0])
    level = compose.normalize(SHARED)
    paid = next(option.cost_bits for option in gene.options if option.level == SHARED)
    assert paid == 2 * compose.cost_bits(level, shape) - compose.shared_bits(level, shape)
    alone = next(g for g in job.space.genes if g.units[0].startswith("model.layers.2."))
    assert [option.level for option in alone.options] == [OWN]


def test_by_default_four_levels_are_offered(home: Path) -> None:
    job = Job(recipe(home, "x", pin={}, levels=None, budget={"bits": 4}))
    menu = job.menus["model.layers.0.mlp.up_proj"]
    assert sum(bool(compose.n_shared(level)) for level in menu) == 4


def test_what_does_not_go_with_it_is_refused(home: Path) -> None:
    for changes, told in [
        ({"drop": {"kinds": ["mlp"]}}, "does not go with drop"),
        ({"refine": "fast"}, "does not go with refine"),
        ({"tie": [["q_proj", "k_proj"]]}, "does not go with tie"),
        ({"export": "gguf", "levels": None}, "does not go with export"),
    ]:
        with pytest.raises(ValueError, match=told):
            recipe(home, "x", **changes)
    with pytest.raises(ValueError, match=r"such levels need share \(--share\)"):
        Job(recipe(home, "x", share=False))
    with pytest.raises(ValueError, match="layers.2.* shares with no other layer"):
        Job(recipe(home, "x", pin={"model.layers.2.*": SHARED}))
    with pytest.raises(ValueError, match="shared=true is of a last term"):
        compose.normalize("lowrank:rank=4,shared=true")


def test_a_plan_with_shared_levels_cannot_be_applied(made: Any, home: Path) -> None:
    config = EvoPressConfig(plan=made.plan, data=str(home / "text.txt"))
    with pytest.raises(ValueError, match="which only a search makes"):
        AutoModelForCausalLM.from_pretrained(home / "dense", quantization_config=config)


def test_tensors_that_are_shared_are_those_before_the_last_term() -> None:
    level = compose.normalize(SHARED)
    names = {"m.0.a": (64, 64), "m.1.a": (64, 64), "m.2.a": (64, 64)}
    found = shared_tensors(dict.fromkeys(names, level), names)
    assert found == {f"m.1.a.{x}": f"m.0.a.{x}" for x in ("codes", "scales", "zeros")}
    assert not shared_tensors(
        {**dict.fromkeys(names, level), "m.0.a": compose.normalize(OWN)}, names
    )


def test_the_second_device_makes_the_same(home: Path) -> None:
    with using("sim"):
        there = compress(recipe(home, "shared-sim", work=str(home / "shared-sim.work")), window=64)
    model = AutoModelForCausalLM.from_pretrained(there.folder).to("sim")
    layers = compressed_layers(model)
    first, second = (layers[f"model.layers.{n}.mlp.up_proj"] for n in (0, 1))
    assert torch.equal(first.state["codes"].cpu(), second.state["codes"].cpu())
    assert left_out(layers)  # still one tensor
    assert torch.isfinite(model(torch.arange(1, 9)[None].to("sim")).logits).all()
