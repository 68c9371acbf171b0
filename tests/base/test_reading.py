"""What is wrong with a file is said in a sentence that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_evopress.base.reading import read_json, read_object, reading


def raised(error: Exception) -> None:
    raise error


ERRORS = {
    "a key that is missing": (lambda: {}["name"], r"x\.json: it lacks 'name'"),
    "an entry that is missing": (lambda: [][3], r"x\.json: it lacks an entry"),
    "a dict for text": (lambda: {{}: 1}, r"x\.json: a value is of the wrong type \(unhash"),
    "a number for a dict": (lambda: (1.5).get("a"), r"x\.json: a value is of the wrong type"),
    "a number that is too large": (lambda: int(float("inf")), r"x\.json: a number is too large"),
    "no text": (lambda: b"\xff".decode(), r"x\.json: it is not text in UTF-8"),
    "no JSON": (lambda: json.loads("{"), r"x\.json: it is not valid JSON"),
    "a value of ours": (lambda: raised(ValueError("k is 3")), r"^x\.json: k is 3; delete it$"),
    "no memory": (lambda: raised(MemoryError()), r"x\.json: it asks for more memory"),
}


@pytest.mark.parametrize("read, reason", ERRORS.values(), ids=ERRORS)
def test_an_error_names_the_file_and_the_reason(read: Callable[[], Any], reason: str) -> None:
    wrong = pytest.raises((ValueError, TypeError), match=reason)
    with wrong as caught, reading("x.json", way_out="delete it"):
        read()
    assert str(caught.value).endswith("; delete it") and caught.value.__cause__ is not None


def test_an_error_that_names_the_file_or_is_not_about_it_passes() -> None:
    for error in (
        ValueError("x.json is of a later version"),
        FileNotFoundError("x"),
        torch.OutOfMemoryError("of a device"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, reading("x.json"):
            raise error
        assert caught.value is error


def test_json_of_another_kind_and_damaged_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(ValueError, match=r"a\.json: it is not a JSON object but list"):
        read_object(path)
    damaged = pytest.raises(ValueError, match=r"a\.json: it is damaged or no safetensors file")
    with damaged, reading(path), safe_open(path, framework="pt"):
        pass
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json: it is nested too deep"):
        read_json(path)
