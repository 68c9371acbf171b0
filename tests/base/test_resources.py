from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from hf_evopress.base.resources import (
    atomic_path,
    atomic_write,
    bundled,
    clear_leftovers,
    format_size,
    parse_size,
    scratch_folder,
    sha256,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("90MB", 90_000_000), ("90 MiB", 90 << 20), ("1.5GB", 1_500_000_000), ("7", 7), (12, 12),
     ("2k", 2000), ("3kib", 3072), ("4B", 4), (".5MB", 500_000)],
)  # fmt: skip
def test_a_size_is_read_in_bytes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


def test_large_whole_sizes_lose_no_byte() -> None:
    assert parse_size("9007199254740993") == 9007199254740993


@pytest.mark.parametrize("text", ["", "MB", "90 XB", "-3MB", "1e3", -1, True])
def test_what_is_not_a_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(12, "12 B"), (90_500_000, "90.5 MB"), (1_000_000, "1 MB"), (999_600, "1 MB")],
)
def test_a_size_is_printed_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


def test_atomic_write_makes_the_folder_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "new" / "plan.json", "héllo")
    assert path.read_text(encoding="utf-8") == "héllo"
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_an_error_while_writing_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "store.bin", b"old")
    with pytest.raises(OSError, match="disk full"), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["store.bin"]


def test_the_temporary_path_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "plot.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    assert sha256(atomic_write(tmp_path / "f", data)) == hashlib.sha256(data).hexdigest()


def test_a_missing_bundled_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no_such_folder"):
        bundled("no_such_folder")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from hf_evopress.base.resources import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary: os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "unit.bin")], check=False)
    (left,) = tmp_path.iterdir()
    with atomic_path(tmp_path / "other.bin") as temporary:
        clear_leftovers(tmp_path)
        assert not left.exists() and temporary.exists()


def test_a_scratch_folder_of_a_killed_process_is_cleared_and_one_in_use_is_not(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from hf_evopress.base.resources import scratch_folder\n"
        "made = scratch_folder(sys.argv[1], 'inputs')\n"
        "open(made.name + '/0.bin', 'w').close(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    with scratch_folder(tmp_path, "inputs") as used:
        clear_leftovers(tmp_path)
        assert not left.exists() and Path(used).is_dir()
