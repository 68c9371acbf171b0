"""Text that the dense model writes itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_evopress.calibration.own_text as written_module
from hf_evopress.calibration.data import load_tokens
from hf_evopress.calibration.own_text import chat_prefix, write_self, write_sequences


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


TEMPLATE = (
    "{{ 'sys\\n' }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(byte_tokenizer: Any) -> Any:
    made = copy.deepcopy(byte_tokenizer)
    made.chat_template = TEMPLATE
    return made


def test_a_chat_model_begins_with_its_template_up_to_the_users_words(
    trained_llama: Any, chat_tokenizer: Any, tmp_path: Any
) -> None:
    prefix = chat_tokenizer("sys\n<user>")["input_ids"]
    assert chat_prefix(chat_tokenizer) == prefix
    made = write_self(trained_llama, chat_tokenizer, 3, tmp_path, seq_len=32)
    assert made.shape == (3, 32)
    assert all(row[: len(prefix)].tolist() == prefix for row in made)
    assert len({tuple(row.tolist()) for row in made}) == 3


def test_a_base_model_begins_with_a_random_token_that_is_not_special(
    trained_llama: Any, byte_tokenizer: Any, chat_tokenizer: Any, tmp_path: Any
) -> None:
    made = write_self(trained_llama, byte_tokenizer, 40, tmp_path / "a", seq_len=9)
    firsts = set(made[:, 0].tolist())
    assert len(firsts) > 20 and 0 not in firsts
    raw = write_self(trained_llama, chat_tokenizer, 40, tmp_path / "b", kind="self:raw", seq_len=9)
    assert torch.equal(raw, made)


def test_prompts_of_a_file_are_asked_in_turn(
    trained_llama: Any, byte_tokenizer: Any, chat_tokenizer: Any, tmp_path: Any
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("ab\n\n  cde \nfg\n")
    kind = f"self:{file}"
    made = write_self(trained_llama, byte_tokenizer, 5, tmp_path / "a", kind=kind, seq_len=16)
    assert made.shape == (5, 16)
    asked = ["ab", "cde", "fg", "ab", "cde"]
    for row, prompt in zip(made, asked, strict=True):
        ids = byte_tokenizer(prompt)["input_ids"]
        assert row[: len(ids)].tolist() == ids
    assert len({tuple(row.tolist()) for row in made}) == 5
    again = write_self(trained_llama, byte_tokenizer, 5, tmp_path / "a", kind=kind, seq_len=16)
    assert torch.equal(again, made)
    chat = write_self(trained_llama, chat_tokenizer, 1, tmp_path / "b", kind=kind, seq_len=32)
    begin = chat_tokenizer("sys\n<user>ab</s>")["input_ids"]
    assert chat[0, : len(begin)].tolist() == begin


def test_prompts_that_cannot_be_asked_are_refused(
    trained_llama: Any, byte_tokenizer: Any, tmp_path: Any
) -> None:
    def write(name: str) -> None:
        write_self(trained_llama, byte_tokenizer, 2, tmp_path, kind=f"self:{name}", seq_len=8)

    with pytest.raises(FileNotFoundError, match="no file .*missing.txt .* to take prompts from"):
        write(str(tmp_path / "missing.txt"))
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="blank.txt holds no prompts"):
        write(str(tmp_path / "blank.txt"))
    (tmp_path / "long.txt").write_text("a prompt of many bytes\n")
    with pytest.raises(ValueError, match="a prompt alone takes 22 of 8 tokens"):
        write(str(tmp_path / "long.txt"))
    (tmp_path / "old.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="old.txt"):
        write(str(tmp_path / "old.txt"))


def test_own_text_without_a_template_says_what_to_take(
    trained_llama: Any, byte_tokenizer: Any, chat_tokenizer: Any, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="self:chat needs a tokenizer .* take self:raw"):
        write_self(trained_llama, byte_tokenizer, 2, tmp_path, kind="self:chat", seq_len=32)
    with pytest.raises(ValueError, match="the chat template alone takes 10 of 8 tokens"):
        write_self(trained_llama, chat_tokenizer, 2, tmp_path, seq_len=8)
    chat_tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    assert chat_prefix(chat_tokenizer) == []
    file = tmp_path / "prompts.txt"
    file.write_text("hello")
    with pytest.raises(ValueError, match=r"refuses the prompt 'hello' \(no users here\)"):
        write_self(trained_llama, chat_tokenizer, 2, tmp_path, kind=f"self:{file}", seq_len=32)


def test_self_is_refused_where_nothing_writes_it(byte_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"self is what a dense model writes .* is \./self"):
        load_tokens(["self"], byte_tokenizer, n_sequences=1, seq_len=8)


def test_own_text_and_a_file_share_the_windows(byte_tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "text.txt").write_text("abcdefg " * 500)
    asked: list[int] = []

    def write(n: int) -> Any:
        asked.append(n)
        return torch.full((n, 8), 7)

    sources = [str(tmp_path / "text.txt"), "self"]
    made = load_tokens(sources, byte_tokenizer, n_sequences=5, seq_len=8, writers={"self": write})
    assert asked == [2] and int((made == 7).all(dim=1).sum()) == 2 and made.shape == (5, 8)


def test_text_is_the_same_as_with_a_cache_that_grows(
    trained_llama: Any, text_tokens: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text_tokens(3, 48)
    made = write_sequences(trained_llama, tokens, 4, tmp_path / "room")
    monkeypatch.setattr(written_module, "_cache", lambda model, length: None)
    assert torch.equal(made, write_sequences(trained_llama, tokens, 4, tmp_path / "grown"))


def test_memory_is_taken_once(trained_llama: Any) -> None:
    cache = written_module._cache(trained_llama, 8)
    assert cache is not None
    states = torch.randn(2, 1, 3, 4)
    places = set()
    for step in range(2):
        keys, values = cache.update(states + step, states - step, 0)
        places |= {(keys.data_ptr(), values.data_ptr())}
    assert len(places) == 1 and cache.get_seq_length() == 6
    assert torch.equal(keys, torch.cat([states, states + 1], 2))
    assert torch.equal(values, torch.cat([states, states - 1], 2))
