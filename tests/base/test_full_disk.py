"""A full disk is named, whatever the library says that noticed it."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_evopress.base.full_disk import DiskFull, space_for
from hf_evopress.base.resources import atomic_path, atomic_write


@pytest.fixture
def no_room() -> Iterator[None]:
    """No file of this process may be larger than 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["text", "safetensors", "torch"])
def test_a_write_without_room_names_the_file_and_leaves_the_former(
    kind: str, tmp_path: Path, no_room: None
) -> None:
    path, tensor = tmp_path / "x.bin", torch.zeros(1000)
    atomic_write(path, "former")
    with pytest.raises(DiskFull, match=r"x\.bin cannot be written: no space left .* run the same"):
        if kind == "text":
            atomic_write(path, "x" * 2000)
        with atomic_path(path) as temporary:
            if kind == "safetensors":
                save_file({"a": tensor}, temporary)
            torch.save(tensor, temporary)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["former"]


def test_other_errors_pass_and_the_first_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^nothing of the kind$"), space_for(tmp_path):
        raise ValueError("nothing of the kind")
    with pytest.raises(DiskFull, match="inner"), space_for("outer"), space_for("inner"):
        raise OSError(errno.ENOSPC, "No space left on device")
