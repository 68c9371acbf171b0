"""Token windows on disk: made once, found again, never those of other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.calibration import token_cache
from hf_evopress.calibration.data import load_splits
from hf_evopress.calibration.token_cache import cached_splits

SIZES = {"calibration": 4, "search": 2, "test": 0}


@pytest.fixture
def text(tmp_path, structured_text) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(structured_text())
    return path


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_cached_tokens_are_those_of_the_text(text, tmp_path, byte_tokenizer, monkeypatch):
    fresh = load_splits([str(text)], byte_tokenizer, SIZES, seq_len=16)
    assert equal(cached_splits(tmp_path, [str(text)], byte_tokenizer, SIZES, seq_len=16), fresh)
    monkeypatch.setattr(token_cache, "load_splits", None)  # the text is not read again
    again = cached_splits(tmp_path, [str(text)], byte_tokenizer, SIZES, seq_len=16)
    assert equal(again, fresh)


@pytest.mark.parametrize("change", ["text", "seed", "seq_len", "sizes"])
def test_other_settings_are_other_tokens(text, tmp_path, byte_tokenizer, change):
    settings: dict[str, Any] = {"seq_len": 16, "seed": 0}
    cached_splits(tmp_path, [str(text)], byte_tokenizer, SIZES, **settings)
    sizes = SIZES
    if change == "text":
        text.write_text(text.read_text().upper())
    elif change == "sizes":
        sizes = SIZES | {"search": 3}
    else:
        settings[change] += 8
    got = cached_splits(tmp_path, [str(text)], byte_tokenizer, sizes, **settings)
    assert equal(got, load_splits([str(text)], byte_tokenizer, sizes, **settings))


def test_a_damaged_cache_is_named(text, tmp_path, byte_tokenizer):
    cached_splits(tmp_path, [str(text)], byte_tokenizer, SIZES, seq_len=16)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged; delete it"):
        cached_splits(tmp_path, [str(text)], byte_tokenizer, SIZES, seq_len=16)
