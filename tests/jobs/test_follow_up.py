"""A recipe's adapter and training run come after its model, and are checked before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_evopress.adapters.folder import read_adapter
from hf_evopress.jobs.follow_up import check_follow_up, follow_up
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
def place(tiny_model: Any, structured_text: Any, write_model: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text(structured_text(200))
    return write_model(folder, tiny_model(), "rtn:bits=3,group_size=32")


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
