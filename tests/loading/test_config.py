"""EvoPressConfig reads plans from wherever they are and refuses what it does not know."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_evopress import __version__
from hf_evopress.loading.config import FORMAT_VERSION, EvoPressConfig
from hf_evopress.plans.plan import Plan

PLAN = Plan(
    {"model.layers.0.mlp.up_proj": "rtn:bits=3,group_size=32"},
    {"model.layers.0.mlp.up_proj": (128, 64)},
    base_model="me/model",
)


def test_it_survives_config_json() -> None:
    config = EvoPressConfig(PLAN, checksums={"a.weight": "0123abcd"})
    text = json.dumps(config.to_dict())
    assert EvoPressConfig.from_dict(json.loads(text)) == config


def test_config_json_leaves_loading_attributes_out() -> None:
    config = EvoPressConfig(PLAN, data="x.txt", dequantize=True, verify=False, seed=3)
    assert sorted(config.to_dict()) == ["format_version", "plan", "quant_method", "written_by"]


def test_config_json_takes_few_lines_per_unit() -> None:
    assert EvoPressConfig(PLAN).to_dict()["plan"]["shapes"] == {
        "model.layers.0.mlp.up_proj": "128x64"
    }


def test_it_prints_and_copies() -> None:
    config = EvoPressConfig(PLAN)
    assert copy.deepcopy(config) == config
    assert "rtn:bits=3,group_size=32" in repr(config)


def test_a_copy_shares_the_plan_and_nothing_that_can_be_changed() -> None:
    config = EvoPressConfig(PLAN, data=["a.txt"], checksums={"a.weight": "0123abcd"})
    made = copy.deepcopy(config)
    assert made == config and made.plan is config.plan
    made.checksums.clear()
    made.data.append("b.txt")
    made.plan = None
    assert config.checksums and config.data == ["a.txt"] and config.plan is PLAN


def test_changes_to_what_config_json_holds_do_not_reach_the_config() -> None:
    plan = PLAN.replace(search={"menu": [{"bits": 3}]}, results={"kl": {"loss_nats": 0.1}})
    config = EvoPressConfig(plan, checksums={"a.weight": "0123abcd"})
    text = json.dumps(config.to_dict())
    said = config.to_dict()
    said["checksums"].clear()
    said["plan"]["levels"].clear()
    said["plan"]["shapes"].clear()
    said["plan"]["search"]["menu"][0]["bits"] = 4
    said["plan"]["results"]["kl"].clear()
    del said["plan"]["base_model"]
    assert json.dumps(config.to_dict()) == text
    assert plan.to_dict()["search"] == {"menu": [{"bits": 3}]}


def test_configs_with_other_plans_are_not_equal() -> None:
    other = PLAN.replace(levels={"model.layers.0.mlp.up_proj": "rtn:bits=2,group_size=32"})
    assert EvoPressConfig(PLAN) != EvoPressConfig(other)


@pytest.mark.parametrize(
    "source", [PLAN, PLAN.to_dict(), "plan.json", "folder", "checkpoint"], ids=lambda s: type(s)
)
def test_a_plan_is_read_from_an_object_a_file_or_a_folder(source: Any, tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "folder").mkdir()
    PLAN.save(tmp_path / "folder")
    (tmp_path / "checkpoint").mkdir()
    settings = {"quantization_config": EvoPressConfig(PLAN).to_dict()}
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(settings))
    if isinstance(source, str):
        source = str(tmp_path / source)
    assert EvoPressConfig(source).plan == PLAN


def test_a_folder_without_a_plan_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no plan at"):
        EvoPressConfig(str(tmp_path))


def test_a_plan_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="got int"):
        EvoPressConfig(3)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"dequantise": True}, "no option 'dequantise', did you mean 'dequantize'"),
        ({"quant_method": "gptq"}, "quant_method is 'evopress', got 'gptq'"),
        ({"format_version": 0}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"seq_len": 0}, "seq_len must be a whole number above 0, got 0"),
        ({"n_sequences": 1.5}, "n_sequences"),
        ({"checksums": {"a": "xyz"}}, "checksum of a must be 8 hex digits"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvoPressConfig(PLAN, **values)


def test_switches_are_booleans() -> None:
    with pytest.raises(TypeError, match="dequantize must be true or false, got 'yes'"):
        EvoPressConfig(PLAN, dequantize="yes")


def test_a_newer_format_is_refused_before_its_unknown_keys_and_names_a_version() -> None:
    newer = {"format_version": FORMAT_VERSION + 1, "written_by": "7.1.0", "new_key": 1}
    with pytest.raises(ValueError, match=r'format_version 2.*pip install "hf-evopress>=7.1.0"'):
        EvoPressConfig.from_dict(newer)
    del newer["written_by"]
    with pytest.raises(ValueError, match=f"{__version__} reads up to 1: pip install --upgrade"):
        EvoPressConfig.from_dict(newer)
