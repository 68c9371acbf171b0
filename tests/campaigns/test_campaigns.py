"""A little of each campaign, each in a process of its own; the long runs are in README.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(campaign: str, *words: str) -> list[int]:
    """Return the numbers in the last line of a campaign's report."""
    # forks and OpenMP's threads do not go together
    done = subprocess.run(
        [sys.executable, "-m", f"tests.campaigns.{campaign}", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [int(n) for n in re.findall(r"\d+", done.stdout.strip().splitlines()[-1])]


@pytest.mark.slow
def test_five_killed_commands_end_in_the_same_bytes() -> None:
    assert run("kill", "--kills", "5", "--seed", "5")[::2] == [5, 0]


@pytest.mark.slow
def test_a_stack_that_is_killed_ends_in_the_same_bytes() -> None:
    assert run("kill", "--kills", "3", "--command", "stack")[::2] == [3, 0]


@pytest.mark.slow
def test_300_changed_files_are_read_right_or_refused_in_a_sentence() -> None:
    assert run("mutate", "--inputs", "300") == [300, 0]


@pytest.mark.slow
def test_a_full_disk_is_named_and_a_rerun_with_room_ends_in_the_same_bytes() -> None:
    assert run("full_disk", "--sizes", "2", "--command", "export", "merge") == [4, 0]
