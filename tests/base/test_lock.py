"""One writer at a time, by name; a lock is free as soon as its process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_evopress.base.lock import locked

HOLD = """
import sys
from hf_evopress.base.lock import locked
with locked(sys.argv[1], "smol"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_says_which_process_holds_it(tmp_path: Path) -> None:
    other = holder(tmp_path / "lock")
    said = f"smol is being written by process {other.pid} on"
    with pytest.raises(RuntimeError, match=said), locked(tmp_path / "lock", "smol"):
        pass
    other.communicate("")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_is_free_when_its_process_is_gone(ending: int, tmp_path: Path) -> None:
    other = holder(tmp_path / "lock")
    other.send_signal(ending)
    other.wait()
    with locked(tmp_path / "lock", "smol"):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_lock_is_held_twice_by_one_process_and_goes_at_the_end(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", "smol"):
        with locked(tmp_path / "lock", "smol"):
            pass
        assert (tmp_path / "lock").is_file()
    assert not (tmp_path / "lock").exists()


def test_without_file_locks_the_file_of_a_process_that_is_gone_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = holder(tmp_path / "lock")
    monkeypatch.setattr("hf_evopress.base.lock.fcntl", None)
    said = f"process {other.pid}"
    with pytest.raises(RuntimeError, match=said), locked(tmp_path / "lock", "smol"):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path / "lock", "smol"):
        pass


def test_a_place_that_takes_no_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = "smol cannot be written, as no file .*/file .*another place"
    with pytest.raises(OSError, match=words), locked(tmp_path / "file" / "lock", "smol"):
        pass
