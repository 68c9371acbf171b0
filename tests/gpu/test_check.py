"""The script for machines with a card runs, in its smallest form, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "check.sh"


@pytest.mark.slow
def test_it_prints_the_steps_and_their_peaks() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        ["bash", str(SCRIPT), "sim", "--small"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split("|") for line in run.stdout.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows[1:]] == [
        "calibrate, levels",
        "search",
        "export, verify, reload, measure",
        "generate 16 tokens",
    ]
    assert all(float(row[3]) > 0 for row in rows[1:4])
