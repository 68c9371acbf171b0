"""Text that the dense model writes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_evopress.calibration.own_text as written_module
from hf_evopress.calibration.own_text import write_sequences


def test_sequences_begin_as_the_text_does(
    trained_llama: Any, text_tokens: Any, tmp_path: Any
) -> None:
    tokens = text_tokens(3, 32)
    made = write_sequences(trained_llama, tokens, 5, tmp_path, start=4)
    assert made.shape == (5, 32) and made.dtype == torch.long
    pieces = {tuple(w.tolist()) for row in tokens for w in row.unfold(0, 4, 1)}
    assert {tuple(row[:4].tolist()) for row in made} <= pieces
    assert len({tuple(row.tolist()) for row in made}) == 5


def test_what_follows_is_of_the_model_itself(
    trained_llama: Any, text_tokens: Any, tmp_path: Any
) -> None:
    """A trained model finds its own text far likelier than random tokens, or another text."""
    made = write_sequences(trained_llama, text_tokens(4, 64), 16, tmp_path, start=4)
    random = torch.randint(int(made.max()) + 1, made.shape)
    losses = [
        float(trained_llama(input_ids=ids, labels=ids, use_cache=False).loss)
        for ids in (made, random)
    ]
    assert losses[0] < 0.5 * losses[1]


def test_a_seed_decides_and_a_second_call_reads(
    trained_llama: Any, text_tokens: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text_tokens(3, 32)
    first = write_sequences(trained_llama, tokens, 4, tmp_path / "a")
    assert torch.equal(first, write_sequences(trained_llama, tokens, 4, tmp_path / "b"))
    assert not torch.equal(first, write_sequences(trained_llama, tokens, 4, tmp_path / "c", seed=1))
    monkeypatch.setattr(trained_llama, "generate", None)
    assert torch.equal(first, write_sequences(trained_llama, tokens, 4, tmp_path / "a"))
    with pytest.raises(ValueError, match="seed"):
        write_sequences(trained_llama, tokens, 4, tmp_path / "a", seed=1)


def test_a_stopped_run_goes_on_to_the_same_text(
    trained_llama: Any, text_tokens: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written_module, "_BATCH_TOKENS", 64)
    tokens = text_tokens(3, 32)
    whole = write_sequences(trained_llama, tokens, 6, tmp_path / "whole")
    steps = []

    def stop(what: str, done: int, total: int) -> None:
        steps.append((what, done, total))
        if done > 64:  # the first two of three batches are written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sequences(trained_llama, tokens, 6, tmp_path / "cut", progress=stop)
    assert torch.equal(whole, write_sequences(trained_llama, tokens, 6, tmp_path / "cut"))
    assert steps == [("write", done, 96) for done in (32, 64, 96)]


def test_the_models_own_sampling_settings_do_not_count(
    trained_llama: Any, text_tokens: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text_tokens(3, 32)
    plain = write_sequences(trained_llama, tokens, 4, tmp_path / "plain")
    own = GenerationConfig(temperature=0.01, top_k=1, eos_token_id=int(plain[0, -4]))
    monkeypatch.setattr(trained_llama, "generation_config", own)
    state = torch.random.get_rng_state()
    assert torch.equal(plain, write_sequences(trained_llama, tokens, 4, tmp_path / "set"))
    assert trained_llama.generation_config is own
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_sequence_begins_with_bos_where_the_texts_do(
    trained_llama: Any, text_tokens: Any, tmp_path: Any
) -> None:
    made = write_sequences(trained_llama, text_tokens(3, 32), 4, tmp_path, bos=[7])
    assert made[:, 0].tolist() == [7, 7, 7, 7]


def test_fewer_are_written_side_by_side_where_the_cache_is_large(trained_llama: Any) -> None:
    config = trained_llama.config
    position = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert written_module._batch(trained_llama, 1024) == 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_module, "_CACHE_BYTES", 3 * 1024 * position)
        assert written_module._batch(trained_llama, 1024) == 3
        assert written_module._batch(trained_llama, 8192) == 1


def test_a_start_as_long_as_the_sequence_is_refused(
    trained_llama: Any, text_tokens: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match=r"start must be in 1 \.\. 31.* got 32"):
        write_sequences(trained_llama, text_tokens(3, 32), 4, tmp_path, start=32)
