"""Checksums find every flipped bit of a tensor, in pieces, without the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_evopress.store import checksums
from hf_evopress.store.checksums import checksum, checksums_of, verify_tensors
from hf_evopress.store.header import Entry, entries_of


def sums_of(path: Path) -> dict[str, str]:
    return {entry.name: value for entry, value in checksums_of(entries_of(path))}


def write(path: Path) -> dict[str, str]:
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b.codes": torch.arange(7, dtype=torch.uint8),
        "b.weight": torch.empty(0, dtype=torch.uint8),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return sums_of(path)


def test_a_tensor_in_a_file_has_the_checksum_of_its_bytes_and_shape(tmp_path: Path) -> None:
    sums = write(tmp_path / "x.safetensors")
    assert sums["b.codes"] == checksum(bytes(range(7)), [7])
    assert sums["b.codes"] != checksum(bytes(range(7)), [1, 7])


def test_empty_tensors_have_none(tmp_path: Path) -> None:
    assert sorted(write(tmp_path / "x.safetensors")) == ["a.weight", "b.codes"]


def test_a_whole_file_passes(tmp_path: Path) -> None:
    sums = write(tmp_path / "x.safetensors")
    verify_tensors(entries_of(tmp_path / "x.safetensors"), sums)


def test_each_flipped_bit_of_the_data_is_found_and_its_tensor_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sums = write(path)
    good = path.read_bytes()
    for offset in range(1, 56):  # 48 bytes of a.weight and 7 of b.codes end the file
        for bit in (0, 7):
            bad = bytearray(good)
            bad[-offset] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=r"1 tensors .*(a\.weight|b\.codes) in .*x\."):
                verify_tensors(entries_of(path), sums)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sums = write(path)
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"x\.safetensors is (truncated|damaged)"):
            verify_tensors(entries_of(path), sums)


def test_a_missing_tensor_is_named_unless_names_may_have_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sums = write(path)
    with pytest.raises(ValueError, match="lacks 1 tensors.*: c"):
        verify_tensors(entries_of(path), sums | {"c": "00000000"})
    verify_tensors(entries_of(path), {"a.weight": sums["a.weight"], "c": "00000000"})


def test_many_files_are_read_by_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 16)
    monkeypatch.setattr(checksums, "_PART_BYTES", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    tensors: list[Entry] = []
    wanted = {}
    for i in range(3):
        file = tmp_path / f"{i}.safetensors"
        made = {f"{i}.{n}": torch.randint(256, (n, 7), dtype=torch.uint8) for n in range(1, 20)}
        save_file(made, file)
        tensors += entries_of(file)
        wanted |= {k: checksum(v.numpy().tobytes(), [*v.shape]) for k, v in made.items()}
    assert {entry.name: value for entry, value in checksums_of(tensors)} == wanted
    verify_tensors(tensors, wanted)
    with pytest.raises(ValueError, match=r"1 tensors .*: 1\.7 in .*1\.safetensors"):
        verify_tensors(tensors, wanted | {"1.7": "00000000"})
    verify_tensors(tensors, wanted | {"1.7": "00000000"}, left_out=["1.7"])
