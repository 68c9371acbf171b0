"""Text to token sequences: files, Hub datasets or strings, cut into disjoint windows.

A source is a file (.txt and other text, .json, .jsonl, .parquet), a Hub dataset written "name",
"name:config" or with "@revision" behind it, or a list of strings. A column of conversations goes
through the tokenizer's chat template. Documents are joined by a blank line and cut into
contiguous windows, which one seed shuffles: the same sources, tokenizer and seed give the same
sequences. Where the tokenizer starts a text with BOS every window does, because the model has
seen no text without it and keeps its attention sink there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT_SOURCE = "HuggingFaceFW/fineweb-edu:sample-10BT"

SELF, CHAT, RAW = "self", "self:chat", "self:raw"
OWN = (SELF, CHAT, RAW)  # sources that are no text: what the dense model writes itself

Source = str | os.PathLike[str] | Sequence[str]
Writer = Callable[[int], Tensor]  # n -> token windows (n, seq_len)

_TABLES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_CHATS = ("messages", "conversations")  # looked for where a dataset has no column "text"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}  # of ShareGPT
_CHUNK_CHARS = 8192  # text is tokenized in pieces of whole paragraphs of about this size
_POOL = 16  # windows to choose from per window needed, so that a seed draws from all over a text


def load_tokens(
    sources: Sequence[Source] | str | os.PathLike[str],
    tokenizer: Any,
    *,
    n_sequences: int,
    seq_len: int,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
    writers: Mapping[str, Writer] | None = None,
) -> Tensor:
    """Return (n_sequences, seq_len) int64 token windows, no two of which overlap.

    Every source gives an equal share. `split` and `column` say where a dataset keeps its text.
    Without sources, text is streamed from the Hub (fineweb-edu). writers: name of a source ->
    what makes n of its windows, where it is no text. Raises ValueError for a source that is too
    short, with the tokens found and needed.
    """
    if n_sequences < 1 or seq_len < 2:
        raise ValueError(f"need n_sequences >= 1 and seq_len >= 2, got {n_sequences} and {seq_len}")
    rng = random.Random(seed)
    if isinstance(sources, (str, os.PathLike)):
        sources = [sources]
    named = list(sources) or [DEFAULT_SOURCE]
    writing = [(writers or {}).get(str(source)) for source in named]
    for source, write in zip(named, writing, strict=True):
        if write is None:
            _check_source(source)
    bos = bos_of(tokenizer)
    shares = [n_sequences // len(named) + (i < n_sequences % len(named)) for i in range(len(named))]
    windows: list[list[int]] = []
    for source, share, write in zip(named, shares, writing, strict=True):
        if write is not None:
            windows += write(share).tolist() if share else []
            continue
        documents = _documents(source, tokenizer, split=split, column=column)
        cut, n_found = _windows(documents, tokenizer, seq_len - len(bos), share * _POOL)
        if len(cut) < share:
            raise ValueError(_too_short(source, n_found, share, seq_len))
        windows += [bos + window for window in rng.sample(cut, share)]
    rng.shuffle(windows)
    return torch.tensor(windows, dtype=torch.long)


def load_splits(
    sources: Sequence[Source] | str | os.PathLike[str],
    tokenizer: Any,
    sizes: Mapping[str, int],
    *,
    seq_len: int,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
    writers: Mapping[str, Writer] | None = None,
) -> dict[str, Tensor]:
    """Return disjoint sets of token windows by name, e.g. {"calibration": 56, "search": 32}."""
    tokens = load_tokens(
        sources,
        tokenizer,
        n_sequences=sum(sizes.values()),
        seq_len=seq_len,
        seed=seed,
        split=split,
        column=column,
        writers=writers,
    )
    return split_tokens(tokens, sizes, seed=seed)


def split_tokens(tokens: Tensor, sizes: Mapping[str, int], *, seed: int = 0) -> dict[str, Tensor]:
    """Return disjoint sets of the sequences (n, seq_len), drawn in an order `seed` decides."""
    needed = sum(sizes.values())
    if min(sizes.values(), default=0) < 0 or needed > len(tokens):
        wanted = ", ".join(f"{name}: {n}" for name, n in sizes.items())
        raise ValueError(
            f"{wanted} sequences are {needed}, the tokens hold {len(tokens)}: give more text, "
            "or ask for fewer or shorter sequences"
        )
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    parts = order[:needed].split(list(sizes.values()))
    return {name: tokens[part] for name, part in zip(sizes, parts, strict=True)}


def tokenize_file(path: str | os.PathLike[str], tokenizer: Any) -> Tensor:
    """Return all tokens of a text file (n,) int64, as `tokenizer(text)` gives them.

    With BOS, where the tokenizer adds it, once at the start: the standard perplexity protocol.
    """
    _check_source(path)
    text = Path(path).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _check_source(source: Source) -> None:
    """Raise FileNotFoundError or ValueError at once for a source that cannot be one."""
    if not isinstance(source, (str, os.PathLike)):
        for i, text in enumerate(source):
            if not isinstance(text, str):
                raise TypeError(f"text {i} of a list of texts is a {type(text).__name__}")
        return
    if source in OWN:
        raise ValueError(
            f"{source} is what a dense model writes itself, for the commands that search; here a "
            "text is needed: a file or a Hub dataset (a file of this name is ./self)"
        )
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{source} is a folder: name a file or a Hub dataset")
    looks_like_file = path.suffix in (*_TABLES, ".txt", ".md", ".raw") or str(source)[:1] in "./~"
    if not path.is_file() and (looks_like_file or str(source).count("/") > 1):
        raise FileNotFoundError(f"no file {source} (in {Path.cwd()}) to take text from")


def _documents(source: Source, tokenizer: Any, *, split: str, column: str) -> Iterator[str]:
    """Yield pieces of text of a source in order; joined they are the text."""
    if not isinstance(source, (str, os.PathLike)):
        yield from (text + "\n\n" for text in source)
        return
    path = Path(source)
    if path.is_file() and path.suffix not in _TABLES:
        yield from _paragraphs(path)
        return
    rows = _table_rows(path) if path.is_file() else _hub_rows(str(source), split)
    yield from _column(rows, column, source, tokenizer)


def _table_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    kind = _TABLES[path.suffix]
    return load_dataset(kind, data_files=str(path), split="train", streaming=True)


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
    with open(path, encoding="utf-8") as file:
        for line in file:
            piece.append(line)
            size += len(line)
            if size >= _CHUNK_CHARS and (not line.strip() or size >= 8 * _CHUNK_CHARS):
                yield "".join(piece)
                piece, size = [], 0
    yield "".join(piece)


def _column(
    rows: Iterable[Mapping[str, Any]], column: str, source: Source, tokenizer: Any
) -> Iterator[str]:
    for row in rows:
        name = column
        if name not in row and name == "text":
            name = next((chat for chat in _CHATS if chat in row), name)
        if name not in row:
            raise ValueError(f"{source} has no column {column!r}; it has: {', '.join(row)}")
        value = row[name]
        if isinstance(value, list):
            yield _chat(value, f"column {name!r} of {source}", tokenizer)
        elif not isinstance(value, str):
            raise TypeError(
                f"column {name!r} of {source} holds {type(value).__name__}, not text or "
                f"conversations; its columns: {', '.join(row)}"
            )
        elif value.strip():
            yield value + "\n\n"


def _chat(turns: list[Any], where: str, tokenizer: Any) -> str:
    """Return a conversation as the tokenizer's template writes it, special tokens included."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} holds conversations, but the tokenizer has no chat template; "
            "name a column of text, or use the tokenizer of a chat model"
        )
    messages = []
    for turn in turns:
        said = turn if isinstance(turn, dict) else {}
        role = said.get("role") or _ROLES.get(str(said.get("from")))
        if role is None:
            raise TypeError(f"{where}: a turn has a role and a content, got {turn!r:.200}")
        messages.append({"role": role, "content": said.get("content", said.get("value"))})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    # every window gets its own BOS where the tokenizer adds one
    return text.removeprefix(tokenizer.bos_token) if bos_of(tokenizer) else text


def _windows(
    documents: Iterable[str], tokenizer: Any, length: int, at_most: int
) -> tuple[list[list[int]], int]:
    """Return consecutive windows of `length` tokens, and how many tokens were found.

    Reads no more text than `at_most` windows need.
    """
    cut: list[list[int]] = []
    left: list[int] = []
    for text in documents:
        left += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        n_full = len(left) // length
        cut += [left[i * length : (i + 1) * length] for i in range(n_full)]
        left = left[n_full * length :]
        if len(cut) >= at_most:
            break
    return cut[:at_most], len(cut) * length + len(left)


def bos_of(tokenizer: Any) -> list[int]:
    """Return [BOS] for a tokenizer that starts texts with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _too_short(source: Source, found: int, n_sequences: int, seq_len: int) -> str:
    name = source if isinstance(source, (str, os.PathLike)) else f"a list of {len(source)} texts"
    return (
        f"{name} holds {found} tokens, {n_sequences} sequences of {seq_len} need "
        f"{n_sequences * seq_len}: give more text, fewer sequences or a shorter seq_len"
    )
