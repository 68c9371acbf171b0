"""A search that begins with plans that are there: files, folders, repositories on the Hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_evopress.cli import main
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.search.ask_tell import Search

MENU = [f"gptq:bits={b},group_size=32" for b in (2, 3, 4)]
DATA = {"seq_len": 64, "calibration": 24, "search": 16, "heldout": 4, "test": 0}


def recipe(home: Path, start: list[str], *, bits: float = 3.0, **settings: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(home / "dense"),
            "work": str(home / "work-start"),
            "budget": {"bits": bits},
            "levels": MENU,
            "data": {"sources": [str(home / "text.txt")], **DATA},
            "search": {
                "sensitivity_tokens": 512,
                "settings": {"generations": 0, "tokens": [256, 512], **settings},
                "start": start,
            },
        }
    )


@pytest.fixture(scope="module")
def good(home: Path) -> str:
    """A plan that a search of some generations found."""
    job = Job(recipe(home, [], generations=4))
    return str(find_plan(job, build_levels(job)).save(home / "good.json"))


def test_a_search_measures_the_plans_it_is_given(
    home: Path, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(recipe(home, [good]))
    asked: list[Any] = []
    tell = Search.tell
    monkeypatch.setattr(
        Search, "tell", lambda self, losses: (asked.append(self.ask()), tell(self, losses))[1]
    )
    plan = find_plan(job, build_levels(job))
    assert job.starts == [job.genome(Plan.load(good).levels)]
    assert job.starts[0] in asked[0].genomes
    assert plan.budget["bits_per_weight"] <= 3.0


def test_the_command_takes_plans_to_start_from(
    home: Path, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", home / "dense", "--work", home / "work-cli", "--data", home / "text.txt"]
    words += ["--bits", "3.0", "--start", good, "--generations", "1", "--out", home / "on.json"]
    words += ["--seq-len", "64", "--calibration", "24", "--search-pool", "8"]
    words += [word for level in MENU for word in ("--level", level)]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code, capsys.readouterr().err
    assert Plan.load(home / "on.json").shapes == Plan.load(good).shapes


def test_levels_of_a_start_may_say_what_goes_without_saying(home: Path, good: str) -> None:
    plan = Plan.load(good)
    said = {unit: f"{level},outputs=true" for unit, level in plan.levels.items()}
    path = plan.replace(levels=said).save(home / "said.json")
    assert Job(recipe(home, [str(path)])).starts == Job(recipe(home, [good])).starts


def test_a_default_menu_has_the_levels_of_a_start(home: Path, good: str) -> None:
    shapes = {u: s for u, s in Plan.load(good).shapes.items() if "layers" in u}
    units = list(shapes)
    levels = {**dict.fromkeys(units, "rtn:bits=2,group_size=8"), units[0]: "trellis:bits=1.5"}
    Plan(levels, shapes=shapes).save(home / "far.json")
    wanted = replace(recipe(home, [str(home / "far.json")], bits=6.0), levels=None)
    menus = Job(wanted).menus
    assert {str(level) for level in menus[units[0]]} >= {"trellis:bits=1.5"}
    assert "trellis:bits=1.5" not in map(str, menus[units[1]])
    assert "rtn:bits=2,group_size=8" in map(str, menus[units[1]])


def test_a_start_over_the_budget_is_refused_before_any_weights(home: Path, good: str) -> None:
    with pytest.raises(ValueError, match=r"cannot start from .*good\.json, of .* budget is 2.7"):
        Job(recipe(home, [good], bits=2.7))


def test_a_start_of_other_levels_is_refused_by_name(home: Path, good: str) -> None:
    levels = dict.fromkeys(Plan.load(good).levels, "gptq:bits=2,group_size=16")
    Plan(levels, shapes=Plan.load(good).shapes).save(home / "other.json")
    with pytest.raises(ValueError, match=re.escape("other.json: ") + ".*group_size=16.*--level"):
        Job(recipe(home, [str(home / "other.json")]))
    with pytest.raises(FileNotFoundError, match="gone"):
        Job(recipe(home, [str(home / "gone.json")]))
