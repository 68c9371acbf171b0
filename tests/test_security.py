"""Hostile files: nothing is run, nothing leaves its folder, nothing grows without bound.

Each is refused with a reason; none of them reaches weights, paths or the terminal.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress import EvoPressConfig, Plan
from hf_evopress.adapters.folder import read_adapter, write_adapter
from hf_evopress.models.source import load_checked
from hf_evopress.models.units import find_units
from hf_evopress.plans import repo as plan_repo
from hf_evopress.plans.level import Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.sharing.cards import write_card
from hf_evopress.sharing.hub import check_folder, pull, push_folder
from hf_evopress.store.level_store import LevelStore, Source

from .hub_server import Hub

UNIT = "model.layers.0.mlp.up_proj"
LEVEL = "rtn:bits=4,group_size=32"


def plan_json(**changes: Any) -> str:
    return json.dumps({"levels": {UNIT: LEVEL}, "shapes": {UNIT: "128x64"}, **changes})


class Bomb:
    """Unpickling this touches a file: a test fails if it is ever there."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


# -- plans -------------------------------------------------------------------------------------

HOSTILE_PLANS = {
    "nested too deep": ("[" * 100_000, "not valid JSON"),
    "a number of 5000 digits": (plan_json(budget={"x": 0}).replace("0}", "9" * 5000 + "}"), "JSON"),
    "not an object": ("[1, 2]", "JSON object"),
    "a path as unit": (plan_json(levels={"../../etc/passwd": LEVEL}, shapes={}), "module path"),
    "an absolute path as unit": (
        plan_json(levels={"/etc/passwd": LEVEL}, shapes={}),
        "module path",
    ),
    "a unit that moves the cursor": (plan_json(levels={"a\x1b[2Jb": LEVEL}, shapes={}), "module"),
    "a unit of a megabyte": (plan_json(levels={"a" * 2**20: LEVEL}, shapes={}), "module path"),
    "an impossible shape": (plan_json(shapes={UNIT: "9999999999x9999999999"}), "not a weight's"),
    "a negative shape": (plan_json(shapes={UNIT: [-1, 64]}), "not a weight's"),
    "a shape of an unknown unit": (plan_json(shapes={"b": "4x4"}), "no level for b"),
    "a level of thousands of terms": (
        plan_json(levels={UNIT: " + ".join(["lowrank:rank=1"] * 5000)}, shapes={}),
        "at most 8 terms",
    ),
    "code as level": (plan_json(levels={UNIT: "__import__('os')"}, shapes={}), "not a method name"),
    "an escape in the base model": (
        plan_json(base_model="a\x1b]0;x\x07"),
        "base_model is the name",
    ),
    "a base model that is no text": (plan_json(base_model={"a": 1}), "base_model is the name"),
    "code behind the revision": (plan_json(revision='x"); import os #'), "revision is a branch"),
    "a newer format": (plan_json(format_version=99), "reads up to"),
    "an unknown key": (plan_json(evil=1), "unknown key 'evil'"),
    "a level that is an object": (plan_json(levels={UNIT: {"a": 1}}, shapes={}), "level is a str"),
    "a level that is a list": (plan_json(levels={UNIT: [LEVEL]}, shapes={}), "a level is a string"),
    "a shape of half a weight": (plan_json(shapes={UNIT: [1.5, 64]}), "is out x in"),
    "an endless shape": (plan_json(shapes={UNIT: [1, 64]}).replace("64]", "1e999]"), "out x in"),
}


@pytest.mark.parametrize("text, reason", HOSTILE_PLANS.values(), ids=HOSTILE_PLANS)
def test_a_hostile_plan_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "evopress_plan.json").write_text(text)
    for read in (Plan.load, Plan.from_pretrained):
        with pytest.raises((ValueError, TypeError), match=reason):
            read(tmp_path)


def test_a_plan_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evopress_plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        Plan.from_pretrained(tmp_path)


def test_an_oversized_plan_is_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/plan", {"evopress_plan.json": plan_json().encode()})
    monkeypatch.setattr(plan_repo, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 are read"):
        Plan.from_pretrained("me/plan")
    assert not any("resolve" in request for request in hub.requests)


@pytest.mark.parametrize(
    "name", ["../x.json", "/etc/x.json", "a/b.json", "..json", "x.json\n", "-"]
)
def test_a_plan_name_never_becomes_a_path(hub: Hub, name: str, tmp_path: Path) -> None:
    for source in ("me/plan", tmp_path):
        with pytest.raises(ValueError, match="plain file name"):
            Plan.from_pretrained(source, filename=name)
    with pytest.raises(ValueError, match="plain file name"):
        Plan.from_json(plan_json()).push_to_hub("me/plan", filename=name)
    assert not hub.requests


def test_an_index_cannot_point_outside(hub: Hub) -> None:
    index = {"format_version": 1, "plans": [{"file": "../../secret.json"}]}
    hub.put("me/plan", {"evopress_plans.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match="plain file name"):
        Plan.from_pretrained("me/plan")


def test_what_a_plan_says_cannot_move_the_cursor() -> None:
    hostile = Plan.from_json(plan_json(results={"note": "\x1b[2Jgone"}, budget={"\x07": "\x1b]0;"}))
    assert "\x1b" not in str(hostile) and "\x07" not in str(hostile)


# -- plans against a model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit, level",
    [
        ("model.__class__", LEVEL),
        (UNIT, "lowrank:rank=1000000000"),
        (UNIT, "rtn:bits=4,group_size=1000000000"),
        (UNIT, "rtn:bits=400,group_size=32"),
        (UNIT, "evil:bits=4"),
        (UNIT, "drop"),
    ],
)
def test_a_plan_cannot_make_a_model_do_what_it_should_not(
    unit: str, level: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\w"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=EvoPressConfig(Plan({unit: level}))
        )


def test_a_hostile_plan_in_a_config_is_refused_before_weights_are_read(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for plan, reason in (
        ({"levels": {"../x": LEVEL}}, "module path"),
        ({"levels": {}}, "one unit"),
    ):
        config["quantization_config"] = {"quant_method": "evopress", "plan": plan}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=reason):
            AutoModelForCausalLM.from_pretrained(
                tmp_path, config=AutoConfig.from_pretrained(tmp_path)
            )


def test_a_million_units_are_refused(tmp_path: Path) -> None:
    levels = ",".join(f'"a.{i}":"drop"' for i in range(1_000_000))
    (tmp_path / "evopress_plan.json").write_text(f'{{"levels": {{{levels}}}}}')
    with pytest.raises(ValueError, match="evopress_plan.json: .* 1000000 units"):
        Plan.load(tmp_path)


HOSTILE_SETTINGS = {
    "checksums of another type": ({"checksums": [1]}, "checksums are an object"),
    "a checksum that is a list": ({"checksums": {"a": [1]}}, "checksum of a must be 8 hex"),
    "a plan that is a list": ({"plan": [1]}, "a path or a Hub repository"),
    "a level that is an object": ({"plan": {"levels": {UNIT: {}}}}, "a level is a string"),
    "a version that is text": ({"format_version": "1"}, "format_version must be a whole number"),
    "a setting that is none": ({"evil": 1}, "no option 'evil'"),
}


@pytest.mark.parametrize("said, reason", HOSTILE_SETTINGS.values(), ids=HOSTILE_SETTINGS)
def test_hostile_settings_in_a_config_are_named_with_their_file(
    said: dict[str, Any], reason: str, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path)
    _change(tmp_path / "config.json", quantization_config={"quant_method": "evopress", **said})
    with pytest.raises((ValueError, TypeError), match=rf"config\.json: .*{reason}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


SHARDS = "model.safetensors.index.json"
# what transformers reads by itself: our commands look at it before
HOSTILE_MODELS = {
    "a method of another type": ("config.json", {"quantization_config": {"quant_method": {}}}),
    "a quantization that is a list": ("config.json", {"quantization_config": [1]}),
    "architectures that are numbers": ("config.json", {"architectures": [True]}),
    "a million million layers": ("config.json", {"num_hidden_layers": 10**12}),
    "a number where the index has its metadata": (
        SHARDS,
        {"metadata": 1.5},
    ),
    "no list of shards": (SHARDS, {"weight_map": 1.5}),
    "shards elsewhere": (SHARDS, {"weight_map": {"a": "../x.safetensors"}}),
    "pickled shards": (SHARDS, {"weight_map": {"a": "x.bin"}}),
}


@pytest.mark.parametrize("file, said", HOSTILE_MODELS.values(), ids=HOSTILE_MODELS)
def test_a_hostile_model_is_refused_with_the_name_of_its_file(
    file: str, said: dict[str, Any], tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="60KB")
    _change(tmp_path / file, **said)
    with pytest.raises((ValueError, TypeError), match=rf"{re.escape(file)}: {min(said)} "):
        load_checked(tmp_path)


def test_a_model_that_brings_its_own_code_is_refused_and_nothing_is_asked(
    tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    marker = tmp_path / "run"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    tiny_model().save_pretrained(tmp_path)
    _change(tmp_path / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ValueError, match="config.json: .*code"):
        load_checked(tmp_path)
    assert not marker.exists()


def test_a_pickled_model_runs_nothing(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises((ValueError, OSError)):
        load_checked(tmp_path)
    assert not (tmp_path / "exploded").exists()


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def claims(path: Path, what: str) -> None:
    """Make a safetensors file claim 10 GB: of header, or of its first tensor."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if what == "header":
        path.write_bytes(struct.pack("<Q", 10 * 2**30) + data[8:])
        return
    name = min(name for name in header if name != "__metadata__")
    if what == "data":
        header[name]["data_offsets"][1] += 10 * 2**30
    header[name]["shape"] = [10 * 2**30]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("what", ["header", "data", "shape"])
@pytest.mark.parametrize("kind", ["model", "dense", "adapter", "store"])
def test_a_file_that_claims_ten_gigabytes_is_refused_by_name(
    kind: str, what: str, tiny_model: Callable[..., nn.Module], write_model: Any, tmp_path: Path
) -> None:
    home = write_model(tmp_path, tiny_model(), LEVEL)
    units = find_units(tiny_model())[:1]
    write_adapter(home / "adapter", {u.name: (torch.ones(1, 64), torch.ones(64, 1)) for u in units})
    menus = {u.name: [Level.parse(LEVEL)] for u in units}
    source = Source({"model": "tiny"}, lambda block: {})
    LevelStore.build(home / "store", tiny_model(), units, menus, source)
    read: dict[str, Callable[[], Any]] = {
        "model": lambda: AutoModelForCausalLM.from_pretrained(home / "small"),
        "dense": lambda: load_checked(home / "dense"),
        "adapter": lambda: read_adapter(home / "adapter"),
        "store": lambda: LevelStore(home / "store").state(units[0].name, LEVEL),
    }
    file = min((home / {"model": "small"}.get(kind, kind)).glob("*.safetensors"))
    claims(file, what)
    with pytest.raises((ValueError, TypeError, OSError), match=str(file.parent)):
        read[kind]()


# -- repositories ------------------------------------------------------------------------------

HOSTILE_FILES = {
    "a path out of the folder": ("../evil.json", "not a plain relative path"),
    "a path out from within": ("a/../../evil.json", "not a plain relative path"),
    "an absolute path": ("/tmp/evil.json", "not a plain relative path"),
    "a path for Windows": ("..\\evil.json", "not a plain relative path"),
    "a hidden file": (".bashrc", "not a plain relative path"),
    "a hidden folder": (".git/config.json", "not a plain relative path"),
    "a pickle": ("pytorch_model.bin", "can run code"),
    "a pickle by another name": ("weights.pt", "can run code"),
    "code": ("modeling_evil.py", "can run code"),
    "a program": ("run.sh", "of a kind that no model needs"),
}


@pytest.mark.parametrize("name, reason", HOSTILE_FILES.values(), ids=HOSTILE_FILES)
def test_a_hostile_file_name_stops_a_pull_before_anything_is_downloaded(
    hub: Hub, name: str, reason: str, tmp_path: Path
) -> None:
    hub.put("me/evil", {"config.json": b"{}", name: b"evil"})
    with pytest.raises(ValueError, match=reason):
        pull("me/evil", tmp_path / "in" / "got")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_too_many_files_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.put("me/evil", {f"f{i}.json": b"{}" for i in range(2001)})
    with pytest.raises(ValueError, match="2001 files; a model has at most 2000"):
        pull("me/evil", tmp_path / "got")


def test_more_bytes_than_the_disk_has_are_refused(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("me/big", {"config.json": b"{}" * 100})
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hf_evopress.sharing.hub.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="need 200 bytes, .* has 10 free"):
        pull("me/big", tmp_path / "got")


HOSTILE_CONTENTS = {
    "code from a repository": (
        {"config.json": {"auto_map": {"AutoModel": "x.M"}}},
        "asks for code",
    ),
    "a config that is no object": ({"config.json": [1]}, "not a JSON object"),
    "shards elsewhere": (
        {
            "config.json": {},
            "model.safetensors.index.json": {"weight_map": {"a": "../../x.safetensors"}},
        },
        "no plain .safetensors file",
    ),
    "pickled shards": (
        {"config.json": {}, "model.safetensors.index.json": {"weight_map": {"a": "x.bin"}}},
        "no plain .safetensors file",
    ),
    "shards that are missing": (
        {"config.json": {}, "model.safetensors.index.json": {"weight_map": {"a": "x.safetensors"}}},
        "names x.safetensors, which is missing",
    ),
    "a hostile plan": (
        {"config.json": {}, "evopress_plan.json": {"levels": {"../x": LEVEL}}},
        "module path",
    ),
    "a hostile plan in the config": (
        {
            "config.json": {
                "quantization_config": {"quant_method": "evopress", "plan": {"levels": {}}}
            }
        },
        "at least one unit",
    ),
}


@pytest.mark.parametrize("files, reason", HOSTILE_CONTENTS.values(), ids=HOSTILE_CONTENTS)
def test_a_hostile_file_is_found_before_the_folder_is_used(
    hub: Hub, files: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    hub.put("me/evil", {name: json.dumps(value).encode() for name, value in files.items()})
    with pytest.raises((ValueError, TypeError), match=reason):
        pull("me/evil", tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_links_are_not_pushed(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "secret").write_text("token")
    (tmp_path / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link"):
        push_folder(tmp_path / "model", "me/model")
    (tmp_path / "model" / "notes.txt").unlink()
    (tmp_path / "model" / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        check_folder(tmp_path / "model")
    assert not hub.requests


@pytest.mark.parametrize("subfolder", ["../other", "/x", "a/../b", ".git"])
def test_a_subfolder_stays_inside_the_repository(hub: Hub, subfolder: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a plain relative path"):
        push_folder(tmp_path, "me/model", subfolder=subfolder)


def test_nothing_is_unpickled(hub: Hub, tmp_path: Path) -> None:
    marker = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(marker))
    hub.put("me/evil", {"config.json": b"{}", "evopress_plan.json": bomb})
    with pytest.raises(ValueError, match="UTF-8|JSON"):
        Plan.from_pretrained("me/evil")
    with pytest.raises(ValueError, match="UTF-8|JSON|utf-8"):
        pull("me/evil", tmp_path / "got")
    assert not marker.exists()


# -- recipes and cards -------------------------------------------------------------------------

HOSTILE_RECIPES = {
    "an object of Python": "model: !!python/object/apply:os.system ['touch exploded']\n",
    "a million laughs": "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n"
    + "c: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nmodel: [*c,*c,*c,*c,*c,*c]\n",
    "nested too deep": "model: " + "[" * 20_000,
}


@pytest.mark.parametrize("text", HOSTILE_RECIPES.values(), ids=HOSTILE_RECIPES)
def test_a_hostile_recipe_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((ValueError, TypeError)):
        Recipe.load(tmp_path / "recipe.yaml")
    assert not (tmp_path / "exploded").exists()


def test_a_template_in_a_plan_is_not_filled_in(tmp_path: Path) -> None:
    hostile = plan_json(results={"evaluation": {"{{ 7 * 7 }}": {"perplexity": 2.0}}})
    (tmp_path / "config.json").write_text("{}")
    card = write_card(tmp_path, Plan.from_json(hostile), name="me/x").read_text()
    assert "{{ 7 \\* 7 }}" in card and "49" not in card.partition("## Citation")[0]
