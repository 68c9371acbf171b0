"""Text to token sequences: files, Hub datasets or strings, cut into disjoint windows.

A source is what `text` reads: a file, a Hub dataset written "name", "name:config" or with
"@revision" behind it, or a list of strings. A column of conversations goes through the
tokenizer's chat template. Documents are joined by a blank line and cut into
contiguous windows, which one seed shuffles: the same sources, tokenizer and seed give the same
sequences. Where the tokenizer starts a text with BOS every window does, because the model has
seen no text without it and keeps its attention sink there.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .text import Documents, Source, bos_of, check_source, wrapping_of

DEFAULT_SOURCE = "HuggingFaceFW/fineweb-edu:sample-10BT"

Writer = Callable[[int], Tensor]  # n -> token windows (n, seq_len)

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
    n_wrapped: int = 0,
) -> Tensor:
    """Return (n_sequences, seq_len) int64 token windows, no two of which overlap.

    Every source gives an equal share. `split` and `column` say where a dataset keeps its text.
    Without sources, text is streamed from the Hub (fineweb-edu). writers: name of a source ->
    what makes n of its windows, where it is no text. n_wrapped: each window is so many pieces of
    equal length, each begun and ended as the tokenizer does a text; 0: only begun with BOS. Raises
    ValueError for a source that is too short, with the tokens found and needed.
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
            check_source(source)
    wrap = _Wrap(tokenizer, seq_len, n_wrapped)
    shares = [n_sequences // len(named) + (i < n_sequences % len(named)) for i in range(len(named))]
    windows: list[list[int]] = []
    for source, share, write in zip(named, shares, writing, strict=True):
        if write is not None:
            windows += write(share).tolist() if share else []
            continue
        documents = Documents(source, tokenizer, split=split, column=column)
        cut, n_found = _windows(documents, tokenizer, wrap.length, share * _POOL)
        if len(cut) < share:
            raise ValueError(_too_short(documents, n_found, share, seq_len))
        documents.warn()
        windows += [wrap(window) for window in rng.sample(cut, share)]
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
    n_wrapped: int = 0,
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
        n_wrapped=n_wrapped,
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


def tokenize_file(
    path: str | os.PathLike[str], tokenizer: Any, *, column: str = "text", plain: bool = False
) -> Tensor:
    """Return all tokens of a file (n,) int64, as `tokenizer(text)` gives them.

    Of a table it is the text of a column, row after row with a blank line between.
    With BOS, where the tokenizer adds it, once at the start: the standard perplexity protocol.
    plain: without special tokens.
    """
    check_source(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path} (in {os.getcwd()}) to take text from")
    documents = Documents(path, tokenizer, column=column)
    text = "".join(documents)
    if not text.strip():
        raise ValueError(f"{path} holds no text. {documents.excuse()}".rstrip())
    documents.warn()
    options = {"add_special_tokens": False} if plain else {}
    return torch.tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long)


def wrapped(tokens: Tensor, tokenizer: Any, *, seq_len: int, n_wrapped: int) -> Tensor:
    """Return the tokens (n,) of a text as windows (n, seq_len) of `n_wrapped` whole texts each.

    As those of `load_tokens`, in order; what is left over at the end is not used.
    """
    wrap = _Wrap(tokenizer, seq_len, n_wrapped)
    pieces = tokens[: len(tokens) // wrap.length * wrap.length].view(-1, wrap.length)
    windows = [wrap(piece) for piece in pieces.tolist()]
    return torch.tensor(windows, dtype=torch.long).view(-1, seq_len)


class _Wrap:
    """Puts special tokens around a window of text of `length` tokens, or around parts of it."""

    def __init__(self, tokenizer: Any, seq_len: int, n_texts: int) -> None:
        self.bos, self.end = wrapping_of(tokenizer) if n_texts else (bos_of(tokenizer), [])
        n, around = max(1, n_texts), len(self.bos) + len(self.end)
        # as `models.classes` cuts a sequence into source and target: the first is the shorter
        self.sizes = [seq_len * (i + 1) // n - seq_len * i // n - around for i in range(n)]
        self.length = sum(self.sizes)
        if min(self.sizes) < 1:
            raise ValueError(
                f"seq_len={seq_len} has no room for {n} text{'s' * (n > 1)} of {around} special "
                "tokens and more: take longer sequences"
            )

    def __call__(self, window: list[int]) -> list[int]:
        made, start = [], 0
        for size in self.sizes:
            made += self.bos + window[start : start + size] + self.end
            start += size
        return made


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


def _too_short(documents: Documents, found: int, n_sequences: int, seq_len: int) -> str:
    source = documents.source
    name = source if isinstance(source, (str, os.PathLike)) else f"a list of {len(source)} texts"
    excuse = f" {documents.excuse()}." if documents.excuse() else ""
    return (
        f"{name} holds {found} tokens, {n_sequences} sequences of {seq_len} need "
        f"{n_sequences * seq_len}: give more text, fewer sequences or a shorter seq_len.{excuse}"
    ).rstrip(".")
