"""One reader for all text: tables of every kind, rows that cannot be rendered, bytes of no text."""

from __future__ import annotations

import copy
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hf_evopress.calibration.data import load_tokens, tokenize_file

ROWS = ["the red fox sees the tower.", 'a "quoted", word', "tab\tand\nline", "ä ö ü"]
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write_table(path: Path) -> Path:
    """Write ROWS as the kind of table that the ending of `path` says."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        from datasets import Dataset

        Dataset.from_dict({"text": ROWS}).to_parquet(str(path))
    elif kind in (".csv", ".tsv"):
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            writer.writerows([["id", "text"], *([str(i), row] for i, row in enumerate(ROWS))])
    elif kind == ".json":
        path.write_text(json.dumps([{"text": row} for row in ROWS]))
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return path


def text_of(path: Path, tokenizer: Any, **options: Any) -> str:
    return bytes(tokenize_file(path, tokenizer, **options).tolist()).decode()


KINDS = ("jsonl", "JSONL", "ndjson", "json", "Json", "csv", "CSV", "tsv", "parquet", "PARQUET")


@pytest.mark.parametrize("ending", KINDS)
def test_a_table_is_its_texts_and_never_braces_and_keys(
    ending: str, tmp_path: Path, byte_tokenizer: Any
) -> None:
    path = write_table(tmp_path / f"table.{ending}")
    expected = "".join(f"{row}\n\n" for row in ROWS)
    assert text_of(path, byte_tokenizer) == expected
    (window,) = load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=len(expected.encode()))
    assert bytes(window.tolist()).decode() == expected


def test_json_of_columns_and_json_lines_by_another_name(
    tmp_path: Path, byte_tokenizer: Any
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": ["one", "two"], "id": [1, 2]}))
    assert text_of(path, byte_tokenizer) == "one\n\ntwo\n\n"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert text_of(path, byte_tokenizer) == "one\n\ntwo\n\n"


def test_a_column_can_be_named(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,body\nno,yes\n")
    assert text_of(path, byte_tokenizer, column="body") == "yes\n\n"
    with pytest.raises(ValueError, match="no column 'other'; it has: text, body; .*--column"):
        text_of(path, byte_tokenizer, column="other")


@pytest.mark.parametrize("template", [None, STRICT])
def test_alpaca_rows_are_understood(
    template: str | None, tmp_path: Path, byte_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = template
    path = tmp_path / "alpaca.json"
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
    ]
    path.write_text(json.dumps(rows))
    plain = "Add.\n\n1 and 2\n\n3\n\nGreet.\n\nHello\n\n"
    chat = "<user>Add.\n\n1 and 2<assistant>3\n\n<user>Greet.<assistant>Hello\n\n"
    assert text_of(path, tokenizer) == (chat if template else plain)


BAD = {
    "a system role that the template refuses": {
        "messages": [{"role": "system", "content": "be good"}, *GOOD["messages"]]
    },
    "roles that do not alternate": {"messages": GOOD["messages"][:1] * 2},
    "an empty conversation": {"messages": []},
    "a null row": None,
    "a null conversation": {"messages": None},
    "a turn without content": {"messages": [{"role": "user", "content": None}]},
    "a turn of an unknown role": {"messages": [{"from": "narrator", "value": "once"}]},
    "a turn of a tool": {"conversations": [{"from": "tool", "value": "{}"}]},
    "a turn that is none": {"messages": ["hi"]},
    "a row of another kind": {"other": 1},
    "a row that is a list": [1, 2],
}


@pytest.mark.parametrize("row", BAD.values(), ids=BAD)
def test_a_row_that_cannot_be_rendered_is_left_out_and_counted(
    row: Any, tmp_path: Path, byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = STRICT
    path = tmp_path / "chats.jsonl"
    rows = [GOOD, row, GOOD, row, *[GOOD] * 20]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with caplog.at_level(logging.WARNING):
        tokens = load_tokens([path], tokenizer, n_sequences=1, seq_len=154)
    assert tokenizer.decode(tokens[0]).count("<user>hi") > 5
    (said,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "chats.jsonl: 2 of " in said and "(row 2: " in said
    path.write_text((json.dumps(row) + "\n") * 3)
    with pytest.raises((ValueError, TypeError), match="chats.jsonl"):
        load_tokens([path], tokenizer, n_sequences=1, seq_len=32)


def test_too_few_good_rows_name_the_file_and_the_rows(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "short"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl holds 7 tokens.*1 of 2 rows .*row 2: its"):
        load_tokens([path], byte_tokenizer, n_sequences=1, seq_len=32)
    path.write_text('{"text": null}\n')
    with pytest.raises(ValueError, match=r"holds no text. 1 of 1 rows"):
        tokenize_file(path, byte_tokenizer)


PACKED = {
    "gzip": gzip.compress(b"text"),
    "zstd": b"\x28\xb5\x2f\xfdrest",
    "xz": b"\xfd7zXZ\x00rest",
    "bzip2": b"BZh91AY",
    "zip": b"PK\x03\x04rest",
    "UTF-16": "text".encode("utf-16"),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl"])
def test_packed_text_is_named(ending: str, kind: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    path = tmp_path / f"text.{ending}"
    path.write_bytes(PACKED[kind])
    for read in (tokenize_file, lambda p, t: load_tokens([p], t, n_sequences=1, seq_len=8)):
        with pytest.raises(ValueError, match=rf"text\.{ending} is {kind}, .* at byte 0"):
            read(path, byte_tokenizer)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv"])
@pytest.mark.parametrize("wrong, what", [(b"\xe4", "not text in UTF-8"), (b"\0", "a zero byte")])
def test_bytes_that_are_no_text_are_named_with_their_place(
    wrong: bytes, what: str, ending: str, tmp_path: Path, byte_tokenizer: Any
) -> None:
    path = tmp_path / f"text.{ending}"
    good = write_table(path).read_bytes() if ending != "txt" else b"some lines\n" * 1000
    path.write_bytes(good + b"more " + wrong + b" and more\n")
    with pytest.raises(ValueError, match=rf"text\.{ending} .*{what}.* at byte {len(good) + 5}"):
        tokenize_file(path, byte_tokenizer)


def test_a_byte_order_mark_is_dropped(tmp_path: Path, byte_tokenizer: Any) -> None:
    for name, text in {
        "a.txt": "text",
        "a.jsonl": '{"text": "text"}',
        "a.csv": "text\ntext",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert text_of(tmp_path / name, byte_tokenizer).rstrip() == "text"


def test_damaged_tables_name_the_file_and_the_line(tmp_path: Path, byte_tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"line 2 of .*a\.jsonl is not valid JSON"):
        tokenize_file(tmp_path / "a.jsonl", byte_tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or no parquet file"):
        tokenize_file(tmp_path / "a.parquet", byte_tokenizer)


def test_a_document_longer_than_csv_allows_by_itself(tmp_path: Path, byte_tokenizer: Any) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000)
    assert len(text_of(tmp_path / "a.csv", byte_tokenizer)) == 300_002
