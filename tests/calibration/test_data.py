"""Sequences are contiguous windows of the text, disjoint, and the same for the same seed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from hf_evopress.calibration.data import load_splits, load_tokens, split_tokens, tokenize_file


@pytest.fixture
def text_file(tmp_path, structured_text):
    path = tmp_path / "text.txt"
    path.write_text(structured_text(400), encoding="utf-8")
    return path


@pytest.fixture
def bos_tokenizer(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    return tokenizer


def text_of(tokens):
    return bytes(tokens.tolist()).decode()


def test_every_sequence_is_a_contiguous_piece_of_the_text(text_file, byte_tokenizer):
    tokens = load_tokens([text_file], byte_tokenizer, n_sequences=12, seq_len=64)
    assert tokens.shape == (12, 64) and tokens.dtype == torch.long
    text = text_file.read_text()
    assert all(text_of(row) in text for row in tokens)


def test_sequences_do_not_overlap(tmp_path, byte_tokenizer):
    path = tmp_path / "numbers.txt"
    path.write_text("\n\n".join(f"{i:06d}" for i in range(4000)))
    tokens = load_tokens([path], byte_tokenizer, n_sequences=100, seq_len=80)
    numbers = [n for row in tokens for n in text_of(row)[7:-7].split("\n\n") if len(n) == 6]
    assert len(numbers) == len(set(numbers)) > 500


def test_one_source_needs_no_list(text_file, byte_tokenizer):
    sizes = {"n_sequences": 3, "seq_len": 32}
    one = load_tokens(str(text_file), byte_tokenizer, **sizes)
    assert torch.equal(one, load_tokens([text_file], byte_tokenizer, **sizes))


def test_all_of_a_text_can_be_used(tmp_path, byte_tokenizer):
    path = tmp_path / "exact.txt"
    path.write_text("0123456789" * 16)
    tokens = load_tokens([path], byte_tokenizer, n_sequences=10, seq_len=16)
    assert tokens.numel() == 160


def test_the_same_seed_gives_the_same_sequences_and_another_others(text_file, byte_tokenizer):
    def load(seed):
        return load_tokens([text_file], byte_tokenizer, n_sequences=8, seq_len=64, seed=seed)

    assert torch.equal(load(3), load(3))
    assert not torch.equal(load(3), load(4))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_tables_give_the_same_as_their_texts(suffix, tmp_path, structured_text, byte_tokenizer):
    texts = [structured_text(4, seed=i) for i in range(30)]
    path = tmp_path / f"table.{suffix}"
    rows = [{"body": t, "id": i} for i, t in enumerate(texts)]
    if suffix == "parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    sizes = {"n_sequences": 6, "seq_len": 64}
    from_table = load_tokens([path], byte_tokenizer, column="body", **sizes)
    assert torch.equal(from_table, load_tokens([texts], byte_tokenizer, **sizes))


def test_every_source_gives_its_share(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("a" * 4000)
    (tmp_path / "b.txt").write_text("b" * 4000)
    tokens = load_tokens(
        [tmp_path / "a.txt", tmp_path / "b.txt"], byte_tokenizer, n_sequences=9, seq_len=32
    )
    assert sorted(text_of(row)[0] for row in tokens) == ["a"] * 5 + ["b"] * 4


def test_bos_starts_every_sequence_where_the_tokenizer_adds_it(text_file, bos_tokenizer):
    tokens = load_tokens([text_file], bos_tokenizer, n_sequences=6, seq_len=32)
    assert tokens.shape == (6, 32)
    assert (tokens[:, 0] == 0).all() and (tokens[:, 1:] != 0).all()


def test_too_little_text_says_how_much_there_is_and_the_way_out(tmp_path, byte_tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match=r"holds 100 tokens, 4 sequences of 32 need 128: give"):
        load_tokens([path], byte_tokenizer, n_sequences=4, seq_len=32)
    with pytest.raises(ValueError, match="holds 100 tokens, 1 seq"):
        load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=512)


def test_a_missing_file_is_named(byte_tokenizer):
    with pytest.raises(FileNotFoundError, match="no file nowhere.txt"):
        load_tokens(["nowhere.txt"], byte_tokenizer, n_sequences=1, seq_len=8)


def test_a_folder_is_no_source(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="is a folder"):
        load_tokens([tmp_path], byte_tokenizer, n_sequences=1, seq_len=8)


def test_a_wrong_column_names_those_there_are(tmp_path, byte_tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text('{"body": "hello", "id": 3}\n')
    with pytest.raises(ValueError, match="no column 'text'; it has: body, id"):
        load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=4)
    with pytest.raises(TypeError, match="'id' of .* holds int"):
        load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=4, column="id")


def test_without_text_and_hub_the_way_out_is_named(byte_tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="fineweb-edu.*--data FILE"):
        load_tokens([], byte_tokenizer, n_sequences=1, seq_len=8)


def test_a_hub_dataset_is_streamed_with_its_config(byte_tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "some text of the hub"}] * 50)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("hf_evopress.calibration.text._knock", lambda endpoint: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    tokens = load_tokens(
        ["me/words:small"], byte_tokenizer, n_sequences=3, seq_len=16, split="validation"
    )
    assert tokens.shape == (3, 16)
    assert asked == [(("me/words", "small"), {"split": "validation", "streaming": True})]


def test_a_hub_dataset_is_read_at_its_revision(byte_tokenizer, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs["revision"]))
        return iter([{"text": "some text of the hub"}] * 50)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("hf_evopress.calibration.text._knock", lambda endpoint: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load_tokens(["me/words:small@v1.0"], byte_tokenizer, n_sequences=3, seq_len=16)
    assert asked == [(("me/words", "small"), "v1.0")]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    ],
    ids=["messages", "sharegpt"],
)
def test_conversations_go_through_the_chat_template(row, tmp_path, byte_tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join([json.dumps(row)] * 40))
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    text = "<user>hi</user><assistant>yo</assistant>"
    tokens = load_tokens([path], tokenizer, n_sequences=2, seq_len=len(text))
    for window in tokens:
        assert tokenizer.decode(window) == text


def test_conversations_need_a_chat_template(tmp_path, byte_tokenizer):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=8)


def test_splits_are_disjoint_and_complete(text_file, byte_tokenizer):
    sizes = {"calibration": 6, "search": 4, "heldout": 2}
    parts = load_splits([text_file], byte_tokenizer, sizes, seq_len=32)
    assert {name: len(part) for name, part in parts.items()} == sizes
    whole = load_tokens([text_file], byte_tokenizer, n_sequences=12, seq_len=32)
    rows = sorted(tuple(row.tolist()) for part in parts.values() for row in part)
    assert rows == sorted(tuple(row.tolist()) for row in whole)


def test_a_split_may_be_empty():
    parts = split_tokens(torch.arange(12).view(4, 3), {"a": 4, "b": 0})
    assert parts["b"].shape == (0, 3)


def test_a_split_larger_than_the_tokens_is_refused():
    with pytest.raises(ValueError, match="a: 3, b: 2 sequences are 5, the tokens hold 4"):
        split_tokens(torch.zeros(4, 3, dtype=torch.long), {"a": 3, "b": 2})


def test_a_file_is_tokenized_whole(text_file, byte_tokenizer, bos_tokenizer):
    text = text_file.read_text()
    assert text_of(tokenize_file(text_file, byte_tokenizer)) == text
    tokens = tokenize_file(text_file, bos_tokenizer)
    assert tokens[0] == 0 and len(tokens) == len(text) + 1
