"""The one reader of text: files of any kind, Hub datasets and lists of strings, as documents.

By its ending, in capitals too, a file is a table (.jsonl, .ndjson, .json, .csv, .tsv, .parquet),
of which one column holds text or conversations, or plain text in UTF-8. Rows that cannot be
rendered (null, empty, a template that refuses them) are left out and counted in one warning;
bytes that are no text are an error that names the file and the offset.
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SELF, CHAT, RAW = "self", "self:chat", "self:raw"
OWN = (SELF, CHAT, RAW)  # sources that are no text: what the dense model writes itself
_PROMPTS = "self:"  # and a file: what it answers to the prompts there, one a line

Source = str | os.PathLike[str] | Sequence[str]
Rows = Iterable[Any]

_TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_CHATS = ("messages", "conversations")  # looked for where a dataset has no column "text"
_ALPACA = ("instruction", "input", "output")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # of ShareGPT
_PLAIN_ROLES = ("system", "user", "assistant", "tool", "developer")
_CHUNK_CHARS = 8192  # text is tokenized in pieces of whole paragraphs of about this size
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Documents:
    """The pieces of text of a source, in order; joined they are the text.

    After a run through them `n_rows` and `left_out` (row -> why) say what became of a table.
    """

    def __init__(
        self, source: Source, tokenizer: Any, *, split: str = "train", column: str = "text"
    ) -> None:
        self.source, self.tokenizer, self.split, self.column = source, tokenizer, split, column
        self.n_rows = 0
        self.left_out: dict[int, str] = {}

    def __iter__(self) -> Iterator[str]:
        if not isinstance(self.source, (str, os.PathLike)):
            yield from (text + "\n\n" for text in self.source)
            return
        path = Path(self.source)
        if path.is_file() and path.suffix.lower() not in _TABLES:
            yield from _paragraphs(path)
            return
        rows = _table(path) if path.is_file() else _hub_rows(str(self.source), self.split)
        for self.n_rows, row in enumerate(rows, start=1):
            text = self._render(row)
            if text is not None and text.strip():
                yield text + "\n\n" if not isinstance(row.get(self._column_of(row)), list) else text

    def warn(self) -> None:
        """Say, once, how many rows were left out and why the first was."""
        if self.left_out:
            logger.warning("%s: %s", self.source, self.excuse())

    def excuse(self) -> str:
        """Return what was left out, empty if nothing was."""
        if not self.left_out:
            return ""
        first = next(iter(self.left_out))
        return (
            f"{len(self.left_out)} of {self.n_rows} rows are left out, as they cannot be rendered "
            f"(row {first}: {self.left_out[first]})"
        )

    def _render(self, row: Any) -> str | None:
        """Return the text of a row, None where it has to be left out."""
        if not isinstance(row, Mapping):
            return self._skip("it is no object" if row is not None else "it is null")
        name = self._column_of(row)
        if name == _ALPACA[0] and self.column == "text":
            return self._alpaca(row)
        if name not in row:
            if self.n_rows > len(self.left_out) + 1:  # others have it
                return self._skip(f"it has no {self.column!r}")
            raise ValueError(
                f"{self.source} has no column {self.column!r}; it has: {', '.join(map(str, row))}; "
                "name one with --column"
            )
        value = row[name]
        if value is None:
            return self._skip(f"its {name!r} is null")
        if isinstance(value, list):
            return self._chat(value, name)
        if not isinstance(value, str):
            raise TypeError(
                f"column {name!r} of {self.source} holds {type(value).__name__}, not text or "
                f"conversations; its columns: {', '.join(map(str, row))}"
            )
        return value

    def _column_of(self, row: Mapping[str, Any]) -> str:
        if self.column in row or self.column != "text":
            return self.column
        return next((name for name in (*_CHATS, _ALPACA[0]) if name in row), self.column)

    def _alpaca(self, row: Mapping[str, Any]) -> str | None:
        asked = [str(row[k]) for k in _ALPACA[:2] if row.get(k)]
        answer = row.get(_ALPACA[2])
        if not asked or not isinstance(answer, str):
            return self._skip("it has no instruction or no output")
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n\n".join([*asked, answer])
        turns = [("user", "\n\n".join(asked)), ("assistant", answer)]
        return self._templated([{"role": role, "content": said} for role, said in turns])

    def _chat(self, turns: list[Any], name: str) -> str | None:
        """Return a conversation as the tokenizer's template writes it, special tokens included."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                f"column {name!r} of {self.source} holds conversations, but the tokenizer has no "
                "chat template; name a column of text with --column, or use the tokenizer of a "
                "chat model"
            )
        messages = []
        for turn in turns:
            said = turn if isinstance(turn, dict) else {}
            word = said.get("role") or said.get("from")
            role = _ROLES.get(str(word), word)
            if role not in _PLAIN_ROLES:
                return self._skip(f"a turn is of {word!r}" if word else f"no turn: {turn!r:.80}")
            content = said.get("content", said.get("value"))
            if content is None and not said.get("tool_calls"):
                return self._skip("a turn has no content")
            messages.append({**said, "role": role, "content": content})
        return self._templated(messages) if messages else self._skip("it has no turns")

    def _templated(self, messages: list[dict[str, Any]]) -> str | None:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return self._skip(f"the chat template says: {error}")
        # every window gets its own BOS where the tokenizer adds one
        return text.removeprefix(self.tokenizer.bos_token) if bos_of(self.tokenizer) else text

    def _skip(self, why: str) -> str | None:
        self.left_out[self.n_rows] = why
        return None


def bos_of(tokenizer: Any) -> list[int]:
    """Return [BOS] for a tokenizer that starts texts with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def wrapping_of(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and behind a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return bos_of(tokenizer), []


def is_own(source: Any) -> bool:
    """Return whether a source is what the dense model writes itself."""
    return isinstance(source, str) and (source in OWN or source.startswith(_PROMPTS))


def prompts_file(source: str) -> Path | None:
    """Return the file of prompts that a source such as self:prompts.txt names, if it does."""
    return Path(source.removeprefix(_PROMPTS)) if is_own(source) and source not in OWN else None


def file_of(source: str) -> str | Path:
    """Return what a source reads, where that is a file."""
    return prompts_file(source) or source


def check_source(source: Source) -> None:
    """Raise FileNotFoundError or ValueError at once for a source that cannot be one."""
    if not isinstance(source, (str, os.PathLike)):
        for i, text in enumerate(source):
            if not isinstance(text, str):
                raise TypeError(f"text {i} of a list of texts is a {type(text).__name__}")
        return
    if is_own(source):
        raise ValueError(
            f"{source} is what a dense model writes itself, for the commands that search; here a "
            f"text is needed: a file or a Hub dataset (a file of this name is ./{source})"
        )
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder: name a file or a Hub dataset")
    endings = (*_TABLES, ".txt", ".md", ".raw")
    looks_like_file = path.suffix.lower() in endings or str(source)[:1] in "./~"
    if not path.is_file() and (looks_like_file or str(source).count("/") > 1):
        raise FileNotFoundError(f"no file {source} (in {Path.cwd()}) to take text from")
    if path.is_file() and path.suffix.lower() != ".parquet":
        with open(path, "rb") as file:
            start = file.read(8)
        for magic, kind in (_PACKED | _WIDE).items():
            if start.startswith(magic):
                way_out = "decompress it" if magic in _PACKED else "save it as UTF-8"
                raise ValueError(f"{path} is {kind}, not text in UTF-8, at byte 0: {way_out} first")


def _table(path: Path) -> Rows:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".csv", ".tsv"):
        return _separated(path, "\t" if kind == ".tsv" else ",")
    return _json(path) if kind == ".json" else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _parsed(line, f"line {number} of {path}")


def _json(path: Path) -> Rows:
    """Return the rows of an array, of an object of columns, or of JSON lines by another name."""
    text = "".join(_lines(path))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        lines = (line for line in text.splitlines() if line.strip())
        return (_parsed(x, f"line {i} of {path}") for i, x in enumerate(lines, start=1))
    if isinstance(found, list):
        return found
    columns = found if isinstance(found, dict) else {}
    lengths = {len(v) if isinstance(v, list) else -1 for v in columns.values()}
    if len(lengths) == 1 and -1 not in lengths and not set(_CHATS) & set(columns):
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [found]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error


def _separated(path: Path, separator: str) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # a document may be longer than the usual 128 kB
    try:
        yield from csv.DictReader(_lines(path), delimiter=separator)
    except csv.Error as error:
        raise ValueError(
            f"{path} is no table of comma- or tab-separated values: {error}"
        ) from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no parquet file: {error}") from error


def _hub_rows(source: str, split: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a dataset "name:config@revision"; ConnectionError without the Hub."""
    from datasets import load_dataset
    from huggingface_hub import constants

    name, _, revision = source.partition("@")
    name, _, config = name.partition(":")
    which: dict[str, Any] = {"revision": revision} if revision else {}
    is_online = not constants.HF_HUB_OFFLINE
    try:
        if is_online:
            _knock(constants.ENDPOINT)
        # streaming needs the Hub; offline, what is cached is all there is
        yield from load_dataset(name, config or None, split=split, streaming=is_online, **which)
    except OSError as error:  # huggingface_hub's and datasets' own errors are all OSErrors
        raise ConnectionError(
            f"the dataset {source} cannot be read from the Hub ({error}): "
            "give local text with --data FILE"
        ) from error


def _knock(endpoint: str) -> None:
    """Raise OSError within seconds if the Hub does not answer; datasets retries for half a minute.

    Any HTTP answer will do, an error too.
    """
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except urllib.error.HTTPError:
        pass


def _paragraphs(path: Path) -> Iterator[str]:
    """Yield a text file in pieces that end at blank lines where there are any."""
    piece: list[str] = []
    size = 0
    for line in _lines(path):
        piece.append(line)
        size += len(line)
        if size >= _CHUNK_CHARS and (not line.strip() or size >= 8 * _CHUNK_CHARS):
            yield "".join(piece)
            piece, size = [], 0
    yield "".join(piece)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text in UTF-8, without a byte order mark; ValueError says where not."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(_not_text(path, "holds a zero byte, so is no text,"))
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(_not_text(path, "is not text in UTF-8")) from error


def _not_text(path: Path, what: str) -> str:
    """Return an error that names the first byte of a file that is none of a text in UTF-8."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            zero = line.find(b"\0")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                offset += min(error.start, zero) if zero >= 0 else error.start
                break
            if zero >= 0:
                offset += zero
                break
            offset += len(line)
    return f"{path} {what} at byte {offset}: save it as UTF-8, or give another file"
