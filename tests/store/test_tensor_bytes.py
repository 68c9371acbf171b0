"""Tensors as bytes: read by ranges, written in an order, equal to what the library reads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_evopress.store.header import Entry, entries, entries_of, read_local
from hf_evopress.store.tensor_bytes import in_step, write_tensors

TENSORS = {
    "a": torch.arange(24, dtype=torch.float16).view(4, 6),
    "b": torch.arange(40, dtype=torch.uint8),
    "c": torch.zeros(0, dtype=torch.uint8),
    "d": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "e": torch.arange(7, dtype=torch.uint8),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def found(file: Path) -> dict[str, Entry]:
    return {e.name: e for e in entries(str(file), file.stat().st_size)}


def test_entries_are_the_tensors_of_the_file(file: Path) -> None:
    for name, entry in found(file).items():
        assert entry.shape == tuple(TENSORS[name].shape)
        assert entry.n_bytes == TENSORS[name].nbytes
        raw = read_local(str(file), entry.start, entry.end)
        assert raw == TENSORS[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("names", ["abcde", "edcba", "db", "c"])
def test_a_file_of_some_tensors_in_any_order_is_read_by_the_library(
    file: Path, tmp_path: Path, names: str
) -> None:
    there = found(file)
    write_tensors(tmp_path / "some.safetensors", in_step([there[name] for name in names]))
    made = load_file(tmp_path / "some.safetensors")
    assert made.keys() == set(names)
    assert all(torch.equal(made[name], TENSORS[name]) for name in names)


def test_only_the_bytes_of_what_is_wanted_are_read_neighbours_at_once(
    file: Path, tmp_path: Path
) -> None:
    there = sorted(found(file).values(), key=lambda entry: entry.start)
    wanted = [entry for entry in there if entry.n_bytes][:3]
    read: list[tuple[int, int]] = []

    def watched(name: str, start: int, end: int) -> bytes:
        read.append((start, end))
        return read_local(name, start, end)

    write_tensors(tmp_path / "some.safetensors", wanted, watched)
    assert read == [(wanted[0].start, wanted[-1].end)]


def test_a_source_that_ends_early_is_refused(file: Path, tmp_path: Path) -> None:
    wanted = list(found(file).values())
    with pytest.raises(ValueError, match="truncated"):
        write_tensors(tmp_path / "x.safetensors", wanted, lambda *range: b"")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="truncated"):
        entries(str(file), file.stat().st_size - 4)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no tensors here, only words")
    with pytest.raises(ValueError, match="no safetensors file"):
        entries(str(tmp_path / "x"), 27)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda entry: entry.pop("dtype"), "it lacks 'dtype'"),
        (lambda entry: entry.update(dtype=["U8"]), "a has no dtype: \\['U8'\\]"),
        (lambda entry: entry.update(shape="3"), "a has no shape or no place"),
    ],
)
def test_what_a_header_lacks_is_said(tmp_path: Path, fault: Any, reason: str) -> None:
    entry: dict[str, Any] = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    fault(entry)
    text = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"abc")
    with pytest.raises(ValueError, match=rf"x\.safetensors is damaged .*{reason}"):
        entries_of(path)


def test_bytes_behind_the_last_tensor_are_refused(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")
    with pytest.raises(ValueError, match="is damaged: 4 bytes follow its last tensor"):
        entries_of(file)
