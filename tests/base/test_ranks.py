"""Several processes give the same plan, byte for byte; one that dies ends the job, to resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_evopress.base.ranks import ALONE, Ranks, start

RECIPE = {
    "budget": {"bits": 3.4},
    "levels": [f"gptq:bits={b},group_size=32" for b in (2, 3, 4)],
    "data": {"seq_len": 64, "calibration": 8, "search": 16, "heldout": 2},
    "search": {
        "sensitivity_tokens": 256,
        "settings": {"generations": 2, "offspring": 3, "tokens": [256, 256]},
    },
}

WORKER = """
import os, signal, sys
from pathlib import Path
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
sys.stderr = open(f"{out}.log", "w")
import torch
torch.set_num_threads(1)
if recipe["device"] == "sim":
    from tests import second_device
from hf_evopress.base.devices import using
from hf_evopress.jobs import plan_search
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.recipes.recipe import Recipe

keeps = []
def keep(job, search, keep=plan_search.keep):
    keep(job, search)
    keeps.append(1)
    if rank == dies and len(keeps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

plan_search.keep = keep
job = Job(Recipe.from_dict(recipe))
with using(job.device):
    plan = plan_search.find_plan(job, build_levels(job))
Path(out).write_text(plan.to_json())
Path(out).with_suffix(".device").write_text(str(job.device))
"""


def run(
    home: Path, work: str, world: int, *, dies: int = -1, **changes: Any
) -> tuple[list[int | None], list[str]]:
    """Return exit codes and plans of `world` processes that do one job together."""
    recipe = {
        **RECIPE,
        "device": "cpu",
        "model": str(home / "dense"),
        "work": str(home / work),
        "data": {**RECIPE["data"], "sources": [str(home / "text.txt")]},
        **changes,
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_evopress.jobs.pipeline"])
    (home / "worker.py").write_text(WORKER)
    known = {"world": world, "port": _free_port(), "recipe": recipe, "dies": dies}
    outs = [home / f"{work}-{world}-{rank}.json" for rank in range(world)]
    processes = [
        context.Process(
            target=runpy.run_path,
            args=(str(home / "worker.py"), {**known, "rank": rank, "out": str(out)}),
        )
        for rank, out in enumerate(outs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    return codes, [out.read_text() for out in outs if out.is_file()]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def alone(home: Path) -> str:
    codes, (plan,) = run(home, "one", 1)
    assert codes == [0]
    return plan


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_gives_the_same_plan(home: Path, alone: str, world: int) -> None:
    codes, plans = run(home, f"of{world}", world)
    assert codes == [0] * world and plans == [alone] * world
    for name in ("store", "stats", "moments"):
        for file in sorted((home / "one" / name).glob("*.safetensors")):
            assert _content(file) == _content(home / f"of{world}" / name / file.name)


def _content(path: Path) -> dict[str, Any]:
    """Return tensors and metadata; safetensors writes metadata in no certain order."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
        return tensors | (file.metadata() or {})


@pytest.mark.slow
def test_each_process_has_a_card_of_its_own_and_the_plan_is_the_same(home: Path) -> None:
    """On the second device, which has two cards: three processes share them.

    Without sensitivities: of such a device, autograd goes backwards on the first card only.
    """
    search = {**RECIPE["search"], "sensitivity_tokens": 0}
    plans = {}
    for world in (2, 3):
        work = f"cards{world}"
        codes, plans[world] = run(home, work, world, device="sim", search=search)
        assert codes == [0] * world
        cards = [(home / f"{work}-{world}-{rank}.device").read_text() for rank in range(world)]
        assert cards == [f"sim:{rank % 2}" for rank in range(world)]
    assert len({plan for world in plans.values() for plan in world}) == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_job_goes_on(home: Path, alone: str) -> None:
    codes, plans = run(home, "killed", 2, dies=1)
    assert codes[0] == 1 and codes[1] == -9 and plans == []
    assert "another process of this job has ended" in (home / "killed-2-0.json.log").read_text()
    (state,) = (home / "killed" / "search").glob("*.json")
    assert len(json.loads(state.read_text())["told"]) >= 2
    assert run(home, "killed", 1) == ([0], [alone])


@pytest.mark.slow
def test_torchrun_starts_the_command_line_and_one_process_speaks(home: Path) -> None:
    words = ["search", str(home / "dense"), "--work", str(home / "torchrun"), "--bits", "3.4"]
    words += ["--data", str(home / "text.txt"), "--out", str(home / "plan.json")]
    words += ["-l", "rtn:bits=2,group_size=32", "-l", "rtn:bits=4,group_size=32"]
    words += ["--seq-len", "64", "--calibration", "8", "--search-pool", "8", "--generations", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "hf_evopress", *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (home / "plan.json").is_file() and done.stdout.count("plan written to") == 1


def test_plans_and_batches_are_divided_without_gap_or_overlap() -> None:
    for world in range(1, 8):
        for n_plans in range(9):
            for n_batches in range(1, 5):
                done = [
                    (plan, batch)
                    for rank in range(world)
                    for plans, batches in [Ranks(rank, world).shares(n_plans, n_batches)]
                    for plan in plans
                    for batch in batches
                ]
                everything = [(p, b) for p in range(n_plans) for b in range(n_batches)]
                assert sorted(done) == everything


def test_without_a_launcher_a_process_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for jobs of one process
    table = torch.ones(2)
    assert start() == ALONE and ALONE.is_first and ALONE.owns(5)
    ALONE.add_up(table)
    ALONE.wait()
    assert table.tolist() == [1, 1]
