"""One file of each kind that hf_evopress reads, and what reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    """A file to change, and what reads it: folder -> what must not change.

    is_tree: JSON or YAML. part: only what is below this key is changed. compares: whether all
    that is read has to be as it was; a plan without its results is a plan as well.
    """

    file: str
    read: Callable[[Path], Any]
    is_tree: bool = True
    part: str = ""
    compares: bool = False

    def is_named_in(self, said: str, folder: Path) -> bool:
        """Return whether a refusal says which file it is about."""
        return Path(self.file).name in said or str(folder) in said


def stock(folder: Path) -> Any:
    """The logits of the user's own from_pretrained."""
    from transformers import AutoModelForCausalLM

    return _logits(AutoModelForCausalLM.from_pretrained(folder / "small"))


def checked(folder: Path) -> Any:
    """The logits of what our commands load."""
    from hf_evopress.models.source import load_checked

    return _logits(load_checked(folder / "small"))


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(16)[None]).logits


def plan(folder: Path) -> None:
    from hf_evopress.plans.plan import Plan

    str(Plan.load(folder / "small"))
    str(Plan.from_pretrained(folder / "small"))


def index(folder: Path) -> None:
    from hf_evopress.plans.repo import list_plans

    list_plans(str(folder / "front"))


def recipe(folder: Path) -> None:
    from hf_evopress.recipes.recipe import Recipe

    Recipe.load(folder / "small" / "evopress_recipe.yaml")


def store(folder: Path) -> Any:
    from hf_evopress.store.level_store import LevelStore

    opened = LevelStore(folder / "store")
    found = {}
    for unit in opened.units:
        for level in opened.levels(unit):
            opened.scores(unit, level)
            found[f"{unit} {level}"] = opened.state(unit, level)
    return found


def adapter(folder: Path) -> None:
    from hf_evopress.adapters.folder import read_adapter

    read = read_adapter(folder / "adapter")
    for name in read.factors:
        read.delta(name)


def published(folder: Path) -> None:
    from hf_evopress.plans.published import read_published, to_plan

    to_plan(read_published(folder / "bits.txt"))


def tokens(folder: Path) -> None:
    from hf_evopress.calibration.data import tokenize_file

    from ..conftest import byte_level_tokenizer

    tokenize_file(folder / "rows.jsonl", byte_level_tokenizer())


def statistics(folder: Path) -> None:
    from hf_evopress.calibration.input_moments import load_stats

    for stats in load_stats(folder, 0).values():
        stats.hessian()


def table(folder: Path) -> None:
    from hf_evopress.jobs.tables import read_table

    read_table(folder / "table.json")


def repository(folder: Path) -> None:
    from hf_evopress.sharing.hub import check_folder

    check_folder(folder / "small")


SHARDS = "small/model.safetensors.index.json"


def targets_of(folder: Path) -> dict[str, Target]:
    """Return the files in a folder that `prepare` filled."""
    shard, unit, stats = (
        min(folder.glob(f"{place}/*.safetensors")).relative_to(folder).as_posix()
        for place in ("small", "store", "stats")
    )
    return {
        "plan": Target("small/evopress_plan.json", plan),
        "quantization config": Target(
            "small/config.json", checked, part="quantization_config", compares=True
        ),
        "config": Target("small/config.json", checked),
        "shard index": Target(SHARDS, checked, compares=True),
        "weights": Target(shard, stock, is_tree=False, compares=True),
        "recipe": Target("small/evopress_recipe.yaml", recipe),
        "front": Target("front/evopress_plans.json", index),
        "store index": Target("store/index.json", store),
        "store": Target(unit, store, is_tree=False, compares=True),
        "adapter config": Target("adapter/adapter_config.json", adapter),
        "adapter": Target("adapter/adapter_model.safetensors", adapter, is_tree=False),
        "published": Target("bits.txt", published, is_tree=False),
        "text": Target("rows.jsonl", tokens, is_tree=False),
        "statistics": Target(stats, statistics, is_tree=False),
        "table": Target("table.json", table),
        "folder to share": Target(SHARDS, repository),
    }


def prepare(folder: Path) -> None:
    """Fill `folder` with one of each kind of file."""
    import torch

    from hf_evopress.adapters.folder import write_adapter
    from hf_evopress.calibration.input_moments import calibrate
    from hf_evopress.loading.quantizer import attach
    from hf_evopress.loading.stitch import compress_model
    from hf_evopress.models.units import find_units
    from hf_evopress.plans.level import Level
    from hf_evopress.plans.plan import Plan
    from hf_evopress.plans.repo import entry_of, index_text
    from hf_evopress.recipes.recipe import Recipe
    from hf_evopress.store.level_store import LevelStore, Source

    from ..conftest import make_tiny_model, make_tokens

    model: Any = make_tiny_model("llama").to(torch.bfloat16)
    units = find_units(model)
    menu = [Level.parse(x) for x in ("rtn:bits=4,group_size=32", "magnitude:sparsity=0.5")]
    calibrate(model, make_tokens(2, 16), folder, units=units)
    source = Source({"model": "tiny"}, lambda block: {})
    LevelStore.build(folder / "store", model, units, {u.name: menu for u in units}, source)
    factors = {u.name: (torch.ones(2, u.shape[1]), torch.ones(u.shape[0], 2)) for u in units}
    write_adapter(folder / "adapter", factors, about={"made_by": "eora"})
    levels = {u.name: menu[i % 2] for i, u in enumerate(units)}
    made = Plan(levels, shapes={u.name: u.shape for u in units})
    compress_model(model, made, None)
    attach(model, made)
    model.save_pretrained(folder / "small", max_shard_size="60KB")
    made.save(folder / "small")
    data = {"sources": ["a.txt"]}
    said = {"model": "me/tiny", "budget": {"bits": 4.5}, "levels": list(map(str, menu))}
    Recipe.from_dict({**said, "data": data}).save(folder / "small" / "evopress_recipe.yaml")
    (folder / "front").mkdir()
    entries = [entry_of("a.json", made.to_dict())]
    (folder / "front" / "evopress_plans.json").write_text(index_text(entries))
    (folder / "bits.txt").write_text(
        "".join(f"{u.name}: {2 + i % 3}\n" for i, u in enumerate(units))
    )
    rows = ({"text": f"row {i} of a table", "id": i} for i in range(30))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.json").write_text(json.dumps({u.name: 0.5 for u in units}))
