"""Conversations with images to token sequences, for vision-language models.

A file of JSON lines, each with `messages` in the chat format of transformers, whose content items
are {"type": "text", "text": ...} and {"type": "image", "path": ...}; paths are taken from the
folder of the file. The model's own processor renders each conversation. A sequence is several
conversations one after the other. One whose images do not fit in any more begins the next sequence,
and the end of its text, behind the images, fills up this one: no padding, no image cut in two.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.fingerprint import text_fingerprint
from ..base.resources import sha256
from ..models.images import Images

_LINES = (".jsonl", ".ndjson")
_CHATS = ("messages", "conversations")
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_WRONG = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)
_OTHER_WAYS = ("url", "image", "base64", "image_url")


@dataclass(frozen=True)
class Conversation:
    """One line of a file: its number, its messages, and the paths of its images."""

    line: int
    messages: list[dict[str, Any]]
    images: tuple[Path, ...]


def has_images(source: Any) -> bool:
    """Return whether a source is a file of conversations with images."""
    return has_rows(
        source,
        lambda row: any(i.get("type") == "image" for turn in _turns(row) for i in _items(turn)),
    )


def has_rows(source: Any, are_so: Callable[[Any], bool]) -> bool:
    """Return whether a source is a file of JSON lines of which one is as asked."""
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None or path.suffix.lower() not in _LINES or not path.is_file():
        return False
    return any(are_so(row) for _, row in json_rows(path))


def read_conversations(path: str | Path) -> list[Conversation]:
    """Return the conversations of a file; errors name the line."""
    path = Path(path)
    found = []
    for line, row in json_rows(path):
        where = f"line {line} of {path}"
        images: list[Path] = []
        messages = []
        for turn in _turns(row):
            content = [_item(item, where, path.parent, images) for item in _items(turn)]
            messages.append({"role": turn.get("role"), "content": content})
        if not messages or not all(isinstance(m["role"], str) for m in messages):
            raise ValueError(f"{where} has no messages, each with a role and a content")
        found.append(Conversation(line, messages, tuple(images)))
    return found


def _item(item: dict[str, Any], where: str, folder: Path, images: list[Path]) -> dict[str, Any]:
    """Return one content item with its path made whole, noting the path."""
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind != "image":
        raise ValueError(f"{where} has an item of type {kind!r}: text and image are known")
    path = item.get("path")
    if not isinstance(path, str):
        other = next((key for key in _OTHER_WAYS if key in item), None)
        said = f"by its {other}" if other else "without a path"
        raise ValueError(f'{where} gives an image {said}: write {{"type": "image", "path": FILE}}')
    file = folder / path
    if not file.is_file():
        raise FileNotFoundError(
            f"{where} names the image {path!r}, and there is no file {file}: paths are taken from "
            "the folder of the JSON lines"
        )
    images.append(file)
    return {"type": "image", "path": str(file)}


class ImageText:
    """What makes token sequences of one file, with its images in a folder of their own.

    processor: the model's. token: the id at places of an image. folder: where folders of images
    are kept.
    """

    def __init__(
        self,
        source: str | Path,
        processor: Any,
        folder: Path,
        *,
        token: int,
        seq_len: int,
        seed: int,
    ) -> None:
        self.source, self.processor = Path(source), processor
        self.seq_len, self.seed = seq_len, seed
        self.conversations = read_conversations(source)
        pictures = dict.fromkeys(p for c in self.conversations for p in c.images)
        settings = json.dumps(processor.to_dict(), sort_keys=True, default=str)
        template = str(getattr(processor, "chat_template", None))
        self.fingerprint = text_fingerprint(
            sha256(self.source), *map(sha256, pictures), settings, template, str((seq_len, seed))
        )
        self.images = Images(folder / self.fingerprint, token)

    def write(self, n: int) -> Tensor:
        """Return n token sequences (n, seq_len), no two alike, their images kept."""
        order = list(self.conversations)
        random.Random(self.seed).shuffle(order)
        pieces = [self._rendered(conversation) for conversation in order]
        made: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
        for ids, inputs in self._sequences(pieces):
            made.setdefault(tuple(ids), inputs)
            if len(made) == n:
                break
        if len(made) < n:
            raise ValueError(
                f"{self.source} has conversations for {len(made)} sequences of {self.seq_len} "
                f"tokens, {n} are needed: give more conversations, fewer sequences or a shorter "
                "seq_len"
            )
        for row, inputs in made.items():
            self.images.add(torch.tensor(row), inputs)
        return torch.tensor(list(made), dtype=torch.long)

    def _rendered(self, conversation: Conversation) -> _Piece:
        """Return the tokens of a conversation and what its images became."""
        from jinja2 import TemplateError

        try:
            out = self.processor.apply_chat_template(
                conversation.messages, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (TemplateError, OSError, *_WRONG) as error:  # of templates, decoders, processors
            raise ValueError(
                f"line {conversation.line} of {self.source} cannot be rendered: {error}"
            ) from error
        ids = out["input_ids"][0].tolist()
        inputs = {k: v for k, v in out.items() if k not in _TEXT_INPUTS}
        end = 1 + max((i for i, t in enumerate(ids) if t == self.images.token), default=-1)
        if end > self.seq_len:
            raise ValueError(
                f"the images in line {conversation.line} of {self.source} reach to token {end}, "
                f"sequences have {self.seq_len}: take longer sequences"
            )
        return _Piece(ids, inputs if conversation.images else None, end)

    def _sequences(
        self, pieces: Sequence[_Piece]
    ) -> Iterator[tuple[list[int], list[dict[str, Tensor]]]]:
        """Yield token ids of seq_len with the images among them."""
        ids: list[int] = []
        inputs: list[dict[str, Tensor]] = []
        for piece in pieces:
            if len(ids) + piece.end > self.seq_len:
                yield self._filled(ids, pieces, piece), inputs
                ids, inputs = [], []
            ids = ids + piece.ids
            inputs = inputs + ([piece.inputs] if piece.inputs else [])
            if len(ids) >= self.seq_len:
                yield ids[: self.seq_len], inputs
                ids, inputs = [], []
        if inputs:
            yield self._filled(ids, pieces, pieces[0]), inputs

    def _filled(self, ids: list[int], pieces: Sequence[_Piece], first: _Piece) -> list[int]:
        """Return `ids` with text behind images, of `first` and those behind it, up to seq_len."""
        start = next(i for i, piece in enumerate(pieces) if piece is first)
        order = [*pieces[start:], *pieces[:start]]
        if not any(piece.ids[piece.end :] for piece in order):
            raise ValueError(f"{self.source} has no text behind any image to fill sequences with")
        made = list(ids)
        for piece in cycle(order):
            made += piece.ids[piece.end :]
            if len(made) >= self.seq_len:
                return made[: self.seq_len]
        raise AssertionError("a cycle has no end")


@dataclass(frozen=True)
class _Piece:
    """A rendered conversation; end: the position behind the last place of an image."""

    ids: list[int]
    inputs: dict[str, Tensor] | None
    end: int


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line."""
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except ValueError as error:
                    raise ValueError(f"line {line} of {path} is not valid JSON: {error}") from error


def _turns(row: Any) -> list[dict[str, Any]]:
    said = next((row[key] for key in _CHATS if key in row), ()) if isinstance(row, dict) else ()
    return [turn for turn in said if isinstance(turn, dict)] if isinstance(said, list) else []


def _items(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []
