"""A recipe's adapter and training run come after its model, and are checked before it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hf_evopress.adapters.folder import read_adapter
from hf_evopress.jobs.follow_up import check_follow_up, follow_up
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe

SETTINGS = {"steps": 2, "batch": 2, "seq_len": 32, "sequences": 8, "rank": 2, "save_steps": 2}


def recipe(place: Path, **parts: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(place / "dense"),
            "budget": {"bits": 4},
            "data": {"sources": [str(place / "text.txt")], "seq_len": 32},
            **parts,
        }
    )


@pytest.fixture(scope="module")
def place(
    tiny_model: Any, text_tokens: Any, structured_text: Any, byte_tokenizer: Any,
    tmp_path_factory: Any,
) -> Path:  # fmt: skip
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text(structured_text(200))
    model = tiny_model()
    for name in ("dense", "small"):
        byte_tokenizer.save_pretrained(folder / name)
    model.save_pretrained(folder / "dense")
    units = find_units(model)
    small = copy.deepcopy(model)
    levels = {u.name: "rtn:bits=3,group_size=32" for u in units}
    plan = Plan(levels, shapes={u.name: u.shape for u in units})
    compress_model(small, plan, text_tokens(1, 16))
    attach(small, plan)
    assert compressed_linears(small)
    small.save_pretrained(folder / "small")
    return folder


def test_the_adapter_is_made_and_the_training_run_keeps_it_beside_it(place: Path) -> None:
    asked = recipe(place, adapter={"rank": 2, "calibration": 4}, tune={"settings": dict(SETTINGS)})
    check_follow_up(asked)
    made = follow_up(asked, place / "small")
    assert made["adapter"] == Path(f"{place / 'small'}-eora")
    assert set(read_adapter(made["adapter"]).ranks.values()) == {2}
    assert made["tune"].folder == Path(f"{place / 'small'}-tuned")
    assert len(made["tune"].losses) == 2


def test_a_recipe_without_either_does_nothing_more(place: Path) -> None:
    asked = recipe(place)
    check_follow_up(asked)
    assert follow_up(asked, place / "small") == {}


def test_recipes_survive_yaml_with_both(place: Path, tmp_path: Path) -> None:
    asked = recipe(place, adapter={"size": "1MB"}, tune={"settings": dict(SETTINGS)})
    asked.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == asked


def test_bad_settings_fail_before_the_model_is_made(place: Path) -> None:
    for part, message in (
        ({"adapter": {}}, "one of rank, size or error; got none"),
        ({"adapter": {"rank": 2, "size": "1MB"}}, r"got \['rank', 'size'\]"),
        ({"adapter": {"size": "big"}}, "not a size"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe(place, **part)
    with pytest.raises(ValueError, match=r"unknown key 'tune\.settings\.step'.*'steps'"):
        check_follow_up(recipe(place, tune={"settings": {"step": 3}}))
    with pytest.raises(ValueError, match="cannot train"):
        check_follow_up(recipe(place, tune={"settings": {"train": "everything"}}))
