"""Candidates per second with 1 and with 2 processes, and whether they give the same losses.

    python tests/benchmarks/ranks.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --work demo/quality.work --worlds 1 2

Each process computes with one thread; on fewer free cores than processes, the clock shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from evaluator import candidates, recipe

from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels


def main() -> None:
    words = arguments()
    if words.result:
        return work(words)
    made = {}
    for world in words.worlds:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--result", str(result)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            made[world] = json.loads(result.read_text())
    first = made[words.worlds[0]]
    print("| processes | candidates/s | speed | CPU s of the busiest | losses |")
    print("|---|---|---|---|---|")
    for world, row in made.items():
        same = "the same bits" if row["losses"] == first["losses"] else "DIFFER"
        speed = row["per_second"] / first["per_second"]
        print(f"| {world} | {row['per_second']:.3f} | {speed:.2f}x | {row['cpu']:.1f} | {same} |")


def work(words: argparse.Namespace) -> None:
    """Time one round in this process and its companions; the first one writes the result."""
    job = Job(recipe(words))
    store = build_levels(job)
    plans = [job.levels(genome) for genome in candidates(job, store, words)]
    evaluator = job.evaluator(store)
    numbers = range(words.sequences)
    evaluator.losses(plans, numbers[:1])
    job.ranks.wait()
    start, cpu = time.perf_counter(), time.process_time()
    losses = evaluator.losses(plans, numbers)
    seconds = time.perf_counter() - start
    spent = torch.zeros(job.ranks.world, dtype=torch.float64)
    spent[job.ranks.rank] = time.process_time() - cpu
    job.ranks.add_up(spent)
    if job.ranks.is_first:
        row = {"per_second": len(plans) / seconds, "losses": losses, "cpu": float(spent.max())}
        Path(words.result).write_text(json.dumps(row))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration and search text")
    parser.add_argument("--work", default="demo/quality.work", help="as tests/benchmarks/quality")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=float, default=2.8)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--level", action="extend", nargs="+", help="default: the default menu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=52)
    parser.add_argument("--search", type=int, default=16)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
