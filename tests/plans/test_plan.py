"""Plans are immutable, readable, lossless and know the model they were made for."""

from __future__ import annotations

import copy
import pickle

import pytest

from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import FILE_NAME, Plan

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def plan() -> Plan:
    return Plan(
        {UP: "gptq:bits=3,group_size=64 + lowrank:rank=8", DOWN: "rtn:bits=4,group_size=32"},
        shapes={UP: (128, 64), DOWN: (64, 128)},
        base_model="me/model",
        budget={"bits": 3.3},
        results={"kl": 0.5},
    )


def test_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_plan_survives_a_file_and_a_folder(plan: Plan, tmp_path) -> None:
    assert Plan.load(plan.save(tmp_path / "x.json")) == plan
    plan.save(tmp_path)
    assert (tmp_path / FILE_NAME).is_file() and Plan.load(tmp_path) == plan


def test_json_has_one_line_per_unit_sorted(plan: Plan) -> None:
    lines = [x.strip() for x in plan.to_json().splitlines() if "layers.0" in x]
    assert len(lines) == 4 and lines[:2] == sorted(lines[:2]) and "128x64" in lines[3]


def test_plan_is_a_mapping_that_cannot_change(plan: Plan) -> None:
    assert list(plan) == [DOWN, UP] and plan[DOWN] == Level.parse("rtn:bits=4,group_size=32")
    with pytest.raises(TypeError):
        plan.levels[UP] = Level.parse("dense")  # type: ignore[index]


def test_plan_can_be_copied_hashed_and_sent_to_a_process(plan: Plan) -> None:
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))
    assert len({plan, copy.copy(plan)}) == 1


def test_diff_names_units_whose_levels_differ(plan: Plan) -> None:
    other = Plan({UP: "dense", DOWN: plan[DOWN]})
    assert plan.diff(other) == {UP: (plan[UP], Level.parse("dense"))}


def test_check_lists_every_mismatch(plan: Plan) -> None:
    plan.check({UP: (128, 64), DOWN: (64, 128), "more": (1, 1)})
    with pytest.raises(ValueError, match="up_proj: not in the model") as error:
        plan.check({DOWN: (64, 256)})
    assert "has 64x256, the plan was made for 64x128" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"levels": {"a": "rtn:bits=4,group_size=64"}, "budgt": {}}', "did you mean 'budget'"),
        ('{"levels": {"a": "dense"}, "format_version": 99}', "pip install --upgrade"),
        ('{"levels": {}}', "at least one unit"),
        ("{}", "no 'levels'"),
        ("{nope", "not valid JSON"),
        ('{"levels": ["a"]}', "is an object"),
        ('{"levels": {"a": "dense"}, "shapes": {"a": "4xx"}}', "out x in"),
        ('{"levels": {"a": "dense"}, "shapes": {"a": "-4x4"}}', "not a weight's"),
        ('{"levels": {"a": 3}}', "level is a string"),
    ],
)
def test_bad_plans_are_refused_with_a_reason(text: str, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Plan.from_json(text)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        Plan.load(tmp_path / "nowhere.json")


def test_summary_counts_units_and_weights(plan: Plan) -> None:
    assert "50.0% of weights  rtn:bits=4,group_size=32" in plan.summary()
    assert "me/model" in str(plan) and "kl: 0.5" in str(plan)
