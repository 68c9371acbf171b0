"""One run leaves plans of many sizes, each ready to be applied, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_evopress.cli import main
from hf_evopress.jobs.front import check_front_target, find_front, save_front
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.jobs.search_log import read_log
from hf_evopress.plans.plan import Plan
from hf_evopress.plans.repo import list_plans
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.fitness.task import Task


def recipe(home: Path, **search: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(home / "dense"),
            "work": str(home / "work"),
            "budget": {"bits": 4.5},
            "levels": [f"rtn:bits={b},group_size=32" for b in (2, 3, 4)],
            "data": {
                "sources": [str(home / "text.txt")],
                "seq_len": 64,
                "calibration": 8,
                "search": 16,
                "heldout": 0,
            },
            "search": {"sensitivity_tokens": 512, **search},
        }
    )


@pytest.fixture(scope="module")
def plans(home: Path) -> list[Plan]:
    settings = {"low": 3.0, "points": 5, "tokens": 512, "corrections": 1}
    job = Job(recipe(home, strategy="pareto", settings=settings))
    return find_front(job, build_levels(job))


def test_more_bits_lose_less_from_one_plan_to_the_next(plans: list[Plan]) -> None:
    bits = [plan.budget["bits_per_weight"] for plan in plans]
    losses = [plan.results["kl_nats"] for plan in plans]
    assert len(plans) >= 3 and bits == sorted(bits) and losses == sorted(losses, reverse=True)
    assert bits[0] >= 2.8 and bits[-1] <= 4.5
    assert plans[0].budget["asked"] == "3.0 bits per weight to 4.5 bits per weight"


def test_the_folder_has_each_plan_and_an_index(plans: list[Plan], tmp_path: Path) -> None:
    folder = tmp_path / "front"
    files = save_front(plans[1:], folder)
    assert {f.name for f in save_front(plans, folder)} > {f.name for f in files}
    listed = list_plans(str(folder))
    assert {f.name for f in folder.glob("plan*.json")} == set(listed)
    for plan in plans:
        entry = next(e for e in listed.values() if e.kl_nats == plan.results["kl_nats"])
        assert Plan.load(folder / entry.file) == plan
    save_front(plans[:1], folder)
    assert len(list(folder.glob("plan*.json"))) == len(list_plans(str(folder))) == 1


def test_a_folder_of_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="give another folder"):
        check_front_target(tmp_path)


def test_another_strategy_gives_no_front(home: Path) -> None:
    job = Job(recipe(home))
    with pytest.raises(ValueError, match="needs strategy pareto"):
        find_front(job, build_levels(job))


def test_show_lists_and_draws_the_front(
    plans: list[Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_front(plans, tmp_path / "front")
    with pytest.raises(SystemExit) as exit:
        main(["show", str(tmp_path / "front"), "--plot", str(tmp_path / "front.png")])
    assert exit.value.code == 0 and (tmp_path / "front.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("plan-") >= len(plans)


def test_the_command_line_takes_a_range_of_bits(home: Path, tmp_path: Path) -> None:
    words = ["search", str(home / "dense"), "--work", str(home / "work2"), "--bits", "3:4"]
    words += ["--data", str(home / "text.txt"), "--out", str(tmp_path / "front")]
    words += ["-l", "rtn:bits=2,group_size=32", "-l", "rtn:bits=4,group_size=32"]
    words += ["--seq-len", "64", "--calibration", "8", "--search-pool", "8"]
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 0
    assert all(2.9 <= e.bits_per_weight <= 4 for e in list_plans(str(tmp_path / "front")).values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "3:x"], "number"),
        (["--bits", "3:4", "--strategy", "uniform"], "strategy pareto"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["search", str(home / "dense"), "--work", str(home / "w"), *words])
    assert exit.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_each_generation_is_in_the_log_and_in_the_plan(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"generations": 2, "tokens": [256, 256]}
    job = Job(recipe(home, settings=settings))
    sent: list[Any] = []
    monkeypatch.setattr(job.reports, "update", lambda history: sent.append(len(history)))
    plan = find_plan(job, build_levels(job))
    assert sent and sent[-1] == len(plan.search["history"])
    log = max((home / "work" / "search").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
    written = [{k: v for k, v in row.items() if k != "time"} for row in read_log(log)]
    assert written == [dict(row) for row in plan.search["history"]]
    with pytest.raises(SystemExit) as exit:
        main(["show", str(log), "--plot", str(tmp_path / "curve.png")])
    assert exit.value.code == 0 and (tmp_path / "curve.png").is_file()
    assert "generation" in capsys.readouterr().out


def test_a_function_given_in_python_is_what_the_search_minimises(home: Path) -> None:
    def prefers_few_changes(dense: Any, compressed: Any, labels: Any) -> Any:
        return (dense.argmax(-1) != compressed.argmax(-1)).float().mean()

    settings = {"generations": 1, "tokens": [256, 256]}
    job = Job(recipe(home, settings=settings), fitness=Task(prefers_few_changes))
    plan = find_plan(job, build_levels(job))
    assert 0 <= plan.search["loss"] <= 1
    kl = find_plan(Job(recipe(home, settings=settings)), build_levels(job))
    assert kl.search["loss"] != plan.search["loss"]


def test_levels_can_be_looked_at_token_by_token(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["levels", str(home / "dense"), "--work", str(home / "work3"), "--seq-len", "64"]
    words += ["--data", str(home / "text.txt"), "--calibration", "8", "--search-pool", "8"]
    words += ["-l", "rtn:bits=2,group_size=32", "--diagnose", "rtn:bits=2,group_size=32"]
    with pytest.raises(SystemExit) as exit:
        main(words)
    out = capsys.readouterr().out
    assert exit.value.code == 0 and "at position 0" in out and out.count("_proj") >= 10


def test_a_sum_of_fitnesses_is_what_the_command_line_searches_for(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["search", str(home / "dense"), "--work", str(home / "work2"), "--bits", "3.2"]
    words += ["--data", str(home / "text.txt"), "--out", str(tmp_path / "plan.json")]
    words += ["-l", "rtn:bits=2,group_size=32", "-l", "rtn:bits=4,group_size=32"]
    words += ["--seq-len", "64", "--calibration", "8", "--search-pool", "8", "--generations", "1"]
    with pytest.raises(SystemExit) as exit:
        main([*words, "--fitness", "kl*0.5 + perplexity*0.5"])
    assert exit.value.code == 0
    assert Plan.load(tmp_path / "plan.json").search["fitness"] == "kl*0.5 + perplexity*0.5"
    assert "against knapsack: " in capsys.readouterr().out
