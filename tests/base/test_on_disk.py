"""Hidden states in files: the same numbers, nothing left behind, a full disk said in time."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from hf_evopress.base.on_disk import on_disk
from hf_evopress.base.placement import Place


def mapped(folder: Path) -> int:
    """Return how many deleted files of a folder this process has mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return sum(str(folder) in line and "(deleted)" in line for line in maps.splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_tensor_is_the_same_and_its_file_has_no_name(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(60).view(3, 4, 5).transpose(0, 1).to(dtype)
    made = on_disk(tensor, tmp_path / "hidden")
    assert torch.equal(made, tensor) and made.dtype == dtype
    assert list((tmp_path / "hidden").iterdir()) == []
    made += 1  # a tensor like any other
    assert torch.equal(made, tensor + 1)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="no /proc")
def test_nothing_is_left_when_the_tensor_is_gone(tmp_path: Path) -> None:
    made = on_disk(torch.ones(5000), tmp_path)
    assert mapped(tmp_path) == 1
    del made
    gc.collect()
    assert mapped(tmp_path) == 0


def test_an_empty_tensor_needs_no_file(tmp_path: Path) -> None:
    assert on_disk(torch.empty(0, 3), tmp_path / "no").shape == (0, 3)
    assert not (tmp_path / "no").exists()


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"hidden states need 4 kB more in .*--work") as caught:
        on_disk(torch.ones(1000), tmp_path)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_hidden_states_of_a_place_wait_in_its_folder(tmp_path: Path) -> None:
    place = Place(rest=torch.device("cpu"), folder=tmp_path / "hidden")
    hidden = torch.randn(2, 3)
    assert torch.equal(place.let_rest(hidden), hidden)
    assert (tmp_path / "hidden").is_dir()
