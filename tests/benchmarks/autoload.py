"""What the entry point that loads hf_evopress costs `import torch`, in milliseconds.

    python tests/benchmarks/autoload.py --runs 15

Each run is a fresh process that imports torch without entry points and then times what torch would
do for ours: find its module, load it, call it. Medians, also of the CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

TIMED = """
import time, torch
from importlib.metadata import EntryPoint
point = EntryPoint("hf_evopress", "hf_evopress_autoload:start", "torch.backends")
wall, cpu = time.perf_counter(), time.process_time()
point.load()()
print(1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": root}
    found = []
    for _ in range(runs):
        made = subprocess.run(
            [sys.executable, "-c", TIMED], env=env, capture_output=True, text=True
        )
        made.check_returncode()
        found.append([float(word) for word in made.stdout.split()])
    wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"{wall:.2f} ms, of which {cpu:.2f} ms CPU time; medians of {runs} processes")


if __name__ == "__main__":
    main()
