"""Mapped tensors are those of the safetensors library, private to this process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_evopress.store.header import Entry, entries_of
from hf_evopress.store.mapped import mapped


def test_they_are_those_of_the_library_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(
        {
            "float": torch.randn(3, 5),
            "half": torch.randn(7).to(torch.bfloat16),
            "codes": torch.randint(256, (2, 3, 5), dtype=torch.uint8),
            "one": torch.tensor(3.0, dtype=torch.float16),
            "none": torch.empty(0, 4),
            "flags": torch.tensor([True, False]),
        },
        file,
    )
    before = file.read_bytes()
    found = {entry.name: tensor for entry, tensor in mapped(entries_of(file))}
    wanted = load_file(file)
    assert set(wanted) - set(found) == {"flags"}
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # none shares another's
        tensor.zero_()
    assert file.read_bytes() == before


def test_what_does_not_lie_as_its_dtype_asks_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0)}, file)
    (entry,) = entries_of(file)
    wrong: list[Entry] = [
        entry._replace(start=entry.start + 1, end=entry.end + 1),
        entry._replace(shape=(7,)),
        entry._replace(dtype="F4"),
    ]
    assert not [*mapped(wrong)]
    assert [tensor.tolist() for _, tensor in mapped([entry])] == [[0, 1, 2, 3, 4, 5]]
