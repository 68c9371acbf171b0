"""The tensor types of GGUF files: ggml's bytes, their decoder, error feedback inside them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.maths.ggml import encoder
from hf_evopress.methods.maths.ggml.scalar import LAYOUTS
from hf_evopress.methods.maths.ggml.types import KINDS, fitting
from hf_evopress.methods.maths.linalg import Stats

gguf = pytest.importorskip("gguf", reason="an extra: hf-evopress[gguf]")
needs_ggml = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="an extra: hf-evopress[gguf]"
)
every_kind = pytest.mark.parametrize("name", list(KINDS))


def type_of(name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


def random_blocks(name: str, rows: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (rows, KINDS[name].row_bytes(512))
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def weight_and_stats(rows: int = 48, columns: int = 256) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 2, columns)
    X = torch.randn(4 * columns, columns, generator=generator) @ mix
    return W, Stats(X.T @ X / len(X), n_tokens=len(X))


def loss(W: Tensor, level: str, stats: Stats) -> float:
    made = compose.normalize(level)
    state = compose.compress(made, W, stats)
    delta = W - compose.decompress(made, state, (W.shape[0], W.shape[1]), torch.float32)
    return float(((delta @ stats.gram) * delta).sum())


@every_kind
def test_types_are_numbered_and_sized_as_in_gguf(name: str) -> None:
    kind = KINDS[name]
    assert kind.number == type_of(name).value
    assert (kind.block, kind.block_bytes) == gguf.GGML_QUANT_SIZES[type_of(name)]


@every_kind
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_any_bytes_decode_to_the_bits_that_the_gguf_package_says(name: str) -> None:
    blocks = random_blocks(name)
    level = compose.normalize(f"gguf:type={name}")
    ours = compose.decompress(level, {"blocks": blocks}, (12, 512), torch.float32)
    theirs = torch.tensor(gguf.quants.dequantize(blocks.numpy(), type_of(name)))
    assert torch.equal(ours.isnan(), theirs.isnan())  # random scales may be no numbers
    assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_codes_put_back_give_the_same_bytes(name: str) -> None:
    blocks = random_blocks(name).unflatten(1, (-1, KINDS[name].block_bytes))
    layout = LAYOUTS[name]
    codes = layout.codes(blocks)
    assert codes.shape[-1] == KINDS[name].block and int(codes.max()) <= layout.top
    assert torch.equal(layout.with_codes(blocks, codes), blocks)
    assert torch.equal(layout.codes(layout.with_codes(blocks, codes.flip(-1))), codes.flip(-1))


@needs_ggml
def test_without_feedback_bytes_are_those_of_ggml() -> None:
    W, _ = weight_and_stats()
    level = compose.normalize("gguf:type=q8_0,feedback=false")
    expected = gguf.quants.quantize(W.numpy(), type_of("q8_0"))
    assert torch.equal(compose.compress(level, W, None)["blocks"], torch.tensor(expected))


@needs_ggml
@every_kind
def test_error_feedback_loses_less_at_the_same_bytes(name: str) -> None:
    # lattice codes have feedback between blocks only
    W, stats = weight_and_stats(16 if name in LAYOUTS else 3, 256 if name in LAYOUTS else 768)
    plain = loss(W, f"gguf:type={name},feedback=false", stats)
    assert loss(W, f"gguf:type={name},sink=0.0", stats) < 0.95 * plain


@needs_ggml
@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs"])
def test_types_that_ggml_makes_only_with_importance_ask_for_statistics(name: str) -> None:
    W, _ = weight_and_stats(rows=4)
    level = compose.normalize(f"gguf:type={name},feedback=false")
    assert compose.needs_stats(level)
    with pytest.raises(ValueError, match="gguf needs calibration statistics"):
        compose.compress(level, W, None)


def test_rows_that_a_type_cannot_take_are_refused_with_those_that_fit() -> None:
    level = compose.normalize("gguf:type=q4_k")
    with pytest.raises(ValueError, match="blocks of 256.*576 inputs.*iq4_nl"):
        compose.check_shape(level, (64, 576))
    assert "q4_k" in fitting(1536) and fitting(100) == []


def test_a_missing_wheel_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    W, stats = weight_and_stats(rows=4)
    with pytest.raises(ImportError, match=r"hf-evopress\[gguf\]"):
        compose.compress(compose.normalize("gguf:type=q4_0"), W, stats)
    encoder._library.cache_clear()


@needs_ggml
def test_weights_of_zero_stay_zero() -> None:
    W, stats = weight_and_stats(rows=8)
    W[3] = 0
    for name in LAYOUTS:
        level = compose.normalize(f"gguf:type={name}")
        made = compose.decompress(level, compose.compress(level, W, stats), (8, 256), torch.float32)
        assert torch.isfinite(made).all() and not made[3].any()
