"""A speech recogniser block by block: the same logits and gradients, of the sound of each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_evopress.calibration.end_moments import load_ends
from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.models.classes import SPEECH, call, class_of, embedded, n_losses
from hf_evopress.models.ends import find_ends
from hf_evopress.models.experts import warn_of_experts
from hf_evopress.models.images import give_images, only_text
from hf_evopress.models.sounds import KEY, Sounds, places_for
from hf_evopress.models.two_stacks import stream_of
from hf_evopress.models.units import find_units
from tests.speech import END, N_PLACES, START, whisper

WORDS = [[*range(65, 71), END, 65, 66], list(range(80, 89))]  # the second is cut before its end


@pytest.fixture
def hearing(tmp_path: Path) -> tuple[Any, Tensor]:
    """A tiny Whisper, two rows, and the sounds that it was given for them."""
    model, sounds = whisper(), Sounds(tmp_path, "some", n_places=N_PLACES, end=END)
    noise = torch.Generator().manual_seed(0)
    rows = torch.tensor([places_for(f"{i:016x}", N_PLACES) + w for i, w in enumerate(WORDS)])
    for row in rows:
        sounds.add(row, [{KEY: torch.randn(1, 8, 2 * N_PLACES, generator=noise)}])
    give_images(model, sounds)
    return model, rows


def test_a_row_is_places_of_a_sound_and_words_that_count_up_to_their_end(
    hearing: tuple[Any, Tensor],
) -> None:
    model, rows = hearing
    sounds: Any = model.__dict__["_evopress_images"]
    assert [len(sounds.text(row)) for row in rows] == [N_PLACES + 7, N_PLACES + 9]
    assert sounds.counted(rows[0]).tolist() == list(range(7))
    assert n_losses(model, rows) == 7 + 9
    assert embedded(model, rows)[1].tolist() == [START, *WORDS[1][:-1]]
    assert places_for("0a", 4) == [0, 10, 0, 0] and places_for("0123", 2) == [0, 1]


def test_the_logits_are_those_of_the_model_with_labels(hearing: tuple[Any, Tensor]) -> None:
    model, rows = hearing
    assert class_of(model) is SPEECH
    sounds: Any = model.__dict__["_evopress_images"]
    heard = torch.cat([sounds.of(row[None])[KEY] for row in rows])
    with torch.no_grad():
        labels = rows[:, N_PLACES:].contiguous()
        found = call(model, rows)
        assert torch.equal(found, model(input_features=heard, labels=labels).logits)
        give_images(model, None)
        silent = call(model, rows)
    assert not torch.allclose(found, silent, atol=1e-2)


def test_block_by_block_gives_the_logits_and_gradients_of_the_whole(
    hearing: tuple[Any, Tensor],
) -> None:
    model, rows = hearing
    stream = stream_of(model)
    stream.check(rows)  # to the bit
    names = [unit.name for unit in find_units(model)]
    assert len(names) == 2 * 6 + 2 * 10 and not any("embed" in name for name in names)
    whole = call(model, rows)
    weights = [model.get_submodule(name).weight for name in names]
    expected = torch.autograd.grad(whole.square().sum(), weights)
    hidden = stream.embed(rows)
    assert hidden.shape == (2, N_PLACES + 9, 32)
    for i in range(stream.n_blocks):
        with torch.no_grad():
            assert torch.allclose(stream.run_from(i, rows, hidden), whole, atol=1e-4)
        hidden = stream.run_block(i, hidden)
    found = stream.head(rows, hidden)
    assert torch.allclose(found, whole, atol=1e-4)
    gradients = torch.autograd.grad(found.square().sum(), weights)
    for name, one, two in zip(names, gradients, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-3 * float(two.abs().max())), name


def test_convolutions_are_no_experts(
    hearing: tuple[Any, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_experts(hearing[0])
    assert not caplog.messages


def test_the_head_is_run_on_words_up_to_their_end(hearing: tuple[Any, Tensor]) -> None:
    model, rows = hearing
    stream = stream_of(model)
    with torch.no_grad():
        hidden = stream.embed(rows[:1])
        for i in range(stream.n_blocks):
            hidden = stream.run_block(i, hidden)
        found = stream.head(*only_text(model, rows[:1], hidden))
        assert torch.allclose(found, call(model, rows[:1])[:, :7], atol=1e-5)


def test_calibration_sees_every_layer_and_the_shared_embedding(
    hearing: tuple[Any, Tensor], tmp_path: Path
) -> None:
    model, rows = hearing
    ends, units = find_ends(model), find_units(model)
    assert [end.role for end in ends] == ["tied"]
    calibrate(model, rows, tmp_path, units=[*units, *ends], batch_tokens=32)
    output_moments(model, rows, tmp_path, units=[*units, *ends], batch_tokens=32)
    for unit in units:
        stats = load_stats(tmp_path, unit.block)[unit.name]
        in_encoder = ".encoder." in unit.name or "encoder_attn.k" in unit.name
        in_encoder |= "encoder_attn.v" in unit.name
        assert stats.n_tokens == 2 * (N_PLACES if in_encoder else 9)
        assert load_moments(tmp_path, unit.block)[unit.name].diagonal().max() > 0
    found = load_ends(tmp_path, ends)[ends[0].name]
    assert found.hidden is not None and len(found.hidden) == 7 + 9
    assert found.counts is not None and float(found.counts[START]) > float(found.counts[1])
    assert found.gradient is not None and found.gradient.diagonal().max() > 0
