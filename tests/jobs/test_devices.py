"""The whole line, and each step of it, on a second device that refuses to mix with the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.base.devices import using
from hf_evopress.jobs import pipeline
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.refine.block_tuning import Tuning as BlockTuning
from hf_evopress.refine.blockwise import Settings

from .. import second_device  # registers the device

SIM = torch.device("sim", 0)
# the second device takes 0.1 ms for each small step: two blocks of three, three layers of seven
SKIPPED = ["model.layers.1.*", "*.[qvo]_proj", "*.gate_proj"]


@pytest.fixture(autouse=True)
def sim() -> Any:
    """All that says auto computes on the second device."""
    with using("sim") as device:
        yield device


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are tuned for some steps only: where tensors lie is what counts here."""
    tuning = BlockTuning(steps=4, looks=1, attempts=1, bfloat16=True)
    settings = lambda job, mode: Settings(mode, tuning=tuning)  # noqa: E731
    monkeypatch.setattr("hf_evopress.jobs.refinement.refine_settings", settings)


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(home / "dense"),
        "out": str(home / out),
        "work": str(home / f"{out}.work"),
        "budget": {"bits": 4.0},
        "levels": [f"gptq:bits={b},group_size=32" for b in (2, 4)],
        "skip": [] if {"drop", "sparsity"} & set(changes.get("budget", ())) else SKIPPED,
        "data": {
            "sources": [str(home / "text.txt")],
            "seq_len": 32,
            "calibration": 8,
            "search": 8,
            "heldout": 2,
            "test": 4,
        },
        "search": {
            "sensitivity_tokens": 128,
            "settings": {"generations": 1, "tokens": [64, 128]},
        },
    }
    return Recipe.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def made(home: Path) -> pipeline.Result:
    """A model compressed on the second device."""
    with using("sim"):
        return pipeline.compress(recipe(home, "made"))


def test_the_line_runs_there_and_leaves_nothing_behind(home: Path) -> None:
    before = second_device.live_bytes()
    result = pipeline.compress(recipe(home, "line"))
    assert {row.name for row in result.rows} >= {"dense", "searched"}
    assert result.sample and result.plan.budget["bits_per_weight"] <= 4.0
    assert second_device.live_bytes() == before


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_blocks_give_the_same_checkpoint(
    home: Path, made: pipeline.Result, offload: str
) -> None:
    result = pipeline.compress(recipe(home, f"offloaded-{offload}", offload=offload))
    hidden = home / f"offloaded-{offload}.work" / "hidden"
    assert hidden.is_dir() == (offload == "disk") and not list(hidden.glob("*"))
    assert result.plan.levels == made.plan.levels
    names = [folder / "model.safetensors" for folder in (result.folder, made.folder)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_the_recipe_beside_the_result_names_no_device(home: Path) -> None:
    text = recipe(home, "x", device="sim", offload="cpu").to_yaml()
    assert "sim" not in text and "offload" not in text


STRATEGIES = {
    "evopress": {},
    "layer_error": {},
    "knapsack": {},
    "owl": {"budget": {"sparsity": 0.5}, "levels": None, "families": ["sparse"]},
    "block_influence": {"budget": {"drop": 0.34}, "levels": None},
    "window": {"budget": {"drop": 0.34}, "levels": None},
    "drop_perplexity": {"budget": {"drop": 0.34}, "levels": None},
    "swap": {"budget": {"drop": 0.34}, "levels": None},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_baselines_look_at(home: Path, strategy: str) -> None:
    settings = {"generations": 1} if strategy in ("evopress", "swap") else {}
    search = {"strategy": strategy, "sensitivity_tokens": 128, "settings": settings}
    job = Job(recipe(home, f"by-{strategy}", search=search, **STRATEGIES[strategy]))
    assert find_plan(job, build_levels(job)).levels


# the search for codes is slow on the second device: one square layer is left, and one that is not
SLOW = ["model.layers.[02].*", "*.[kvo]_proj", "*.gate_proj", "*.up_proj"]
OFFLOADED = [
    "gptq:bits=3,group_size=32 + lowrank:rank=4",
    "rtn:bits=4,group_size=32",
    "sparsegpt:sparsity=0.5",
    "trellis:bits=3,state_bits=6",
]
ON_CARD = [
    "sparsegpt:sparsity=0.5,bits=4,group_size=32",
    "wanda:sparsity=0.5",
    "magnitude:sparsity=0.5",
    "lowrank:rank=8",
    "rows:bits=3,top_bits=6,group_size=32",
    "gguf:type=q4_0",
    "dict:bits=4",
    "bitstack:blocks=3",
    "mpo:bits=4",
    "hadamard:bits=3",
    "folded:share=0.5",
]


@pytest.mark.parametrize(
    "level, offload",
    [*((level, "none") for level in OFFLOADED + ON_CARD), *((level, "cpu") for level in OFFLOADED)],
)
def test_levels_of_every_method_are_made_scored_and_loaded(
    home: Path, level: str, offload: str
) -> None:
    if level.startswith("gguf"):
        pytest.importorskip("xllamacpp", reason="an extra: hf-evopress[gguf]")
    words = recipe(
        home,
        f"level-{abs(hash(level))}-{offload}",
        offload=offload,
        levels=[level],
        budget={"ratio": 1.0},
        skip=SLOW if level.startswith("trellis") else SKIPPED,
    )
    job = Job(words)
    store = build_levels(job)
    plan = {unit: store.levels(unit)[0] for unit in store.units}
    (losses,) = job.evaluator(store).losses([plan], [0])
    assert losses[0] > 0
    state = store.state(next(iter(plan)), plan[next(iter(plan))])
    assert all(tensor.device.type == "cpu" for tensor in state.values())
