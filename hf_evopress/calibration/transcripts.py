"""Sound and what is said in it to token sequences, for speech recognisers such as Whisper.

A file of JSON lines {"audio": "call.wav", "text": "what is said"}; paths are taken from the folder
of the file. "language" (such as "de") and "task" (transcribe, translate) are what the tokenizer
begins the text with; without them it begins as it does by itself. A sequence is one line: places of
the sound, and its words as labels of the model, ended and begun again up to the longest.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.fingerprint import text_fingerprint
from ..base.resources import sha256
from ..models.classes import start_of
from ..models.sounds import KEY, Sounds, places_for
from ..models.source import read_extractor, read_tokenizer
from .conversations import has_rows, json_rows
from .sound_files import read_sound

_LEAST = 8  # tokens of a sequence, as a recipe has it
_EXAMPLE = '{"audio": "call.wav", "text": "what is said"}'


@dataclass(frozen=True)
class Transcript:
    """One line of a file: where it is, its sound, and its text as token ids."""

    where: str
    audio: Path
    ids: tuple[int, ...]


def has_sounds(source: Any) -> bool:
    """Return whether a source is a file of JSON lines with sounds."""
    return has_rows(source, lambda row: isinstance(row, dict) and "audio" in row)


class SoundText:
    """What makes token sequences of one file, with its sounds in a folder of their own.

    config, extractor, tokenizer: the model's; the tokenizer is changed. folder: where folders of
    sounds are kept; by default one that is gone with `images`. seq_len: tokens of text at most.
    """

    def __init__(
        self,
        source: str | Path,
        config: Any,
        extractor: Any,
        tokenizer: Any,
        folder: Path | None = None,
        *,
        seq_len: int,
        seed: int,
    ) -> None:
        self.source, self.extractor, self.seed = Path(source), extractor, seed
        self.n_places = int(config.max_source_positions)
        self._frames = (config.num_mel_bins, self.n_places * 2)
        start = start_of(config, str(getattr(config, "name_or_path", source)))
        self.transcripts = read_transcripts(source, tokenizer, start)
        for one in self.transcripts:
            self._samples(one)  # what is wrong with any is said now
        longest = max(len(one.ids) for one in self.transcripts)
        self.seq_len = min(seq_len, max(longest, _LEAST), int(config.max_target_positions))
        self._prints = {one.audio: sha256(one.audio) for one in self.transcripts}
        settings = json.dumps(extractor.to_dict(), sort_keys=True, default=str)
        said = (json.dumps(one.ids) for one in self.transcripts)
        self.fingerprint = text_fingerprint(
            sha256(self.source), *self._prints.values(), *said, settings, str((self.seq_len, seed))
        )
        self.images = Sounds(
            folder, self.fingerprint, n_places=self.n_places, end=tokenizer.eos_token_id
        )

    @property
    def n_sequences(self) -> int:
        """How many sequences there are, no two alike."""
        return len({self._row(one) for one in self.transcripts})

    def write(self, n: int) -> Tensor:
        """Return n token sequences (n, places + seq_len), no two alike, their sounds kept."""
        order = list(self.transcripts)
        random.Random(self.seed).shuffle(order)
        made = {self._row(one): one for one in order}
        if len(made) < n:
            raise ValueError(
                f"{self.source} has {len(made)} sounds, {n} are needed: give more, or take fewer "
                "sequences (--calibration, --search-pool; heldout and test in a recipe)"
            )
        rows = list(made)[:n]
        for row in rows:
            self.images.add(torch.tensor(row), [{KEY: self._features(made[row])}])
        return torch.tensor(rows, dtype=torch.long)

    def _row(self, one: Transcript) -> tuple[int, ...]:
        words = list(one.ids) * -(-self.seq_len // len(one.ids))
        return (*places_for(self._prints[one.audio], self.n_places), *words[: self.seq_len])

    def _samples(self, one: Transcript) -> Any:
        rate = self.extractor.sampling_rate
        seconds = self.n_places * 2 * self.extractor.hop_length / rate
        try:
            return read_sound(one.audio, rate, most_seconds=seconds)
        except ValueError as error:
            raise ValueError(f"{one.where}: {error}") from error

    def _features(self, one: Transcript) -> Tensor:
        """Return what the extractor makes of a sound, (1, mel, frames) float32."""
        made = self.extractor(
            self._samples(one), sampling_rate=self.extractor.sampling_rate, return_tensors="pt"
        )
        found: Tensor = made[KEY].float()
        if tuple(found.shape[1:]) != self._frames:
            raise ValueError(
                f"the feature extractor makes {tuple(found.shape[1:])} (mel bins, frames) of a "
                f"sound, the model reads {self._frames}: preprocessor_config.json is of another "
                "model"
            )
        return found


def read_sounds(
    model: str | Path,
    config: Any,
    sources: Sequence[Any],
    folder: Path | None = None,
    *,
    seq_len: int,
    seed: int = 0,
    **where: Any,
) -> SoundText:
    """Return what makes sequences for the speech recogniser `model` of its one source.

    where: revision, trust_remote_code. The rest as in SoundText.
    """
    if len(sources) != 1 or not has_sounds(sources[0]):
        raise ValueError(
            f"{model} hears sound: give one file of JSON lines {_EXAMPLE} with --data, got "
            f"{', '.join(map(str, sources)) or 'none'}"
        )
    extractor, tokenizer = read_extractor(model, **where), read_tokenizer(model, **where)
    return SoundText(sources[0], config, extractor, tokenizer, folder, seq_len=seq_len, seed=seed)


def read_transcripts(source: str | Path, tokenizer: Any, start: int) -> list[Transcript]:
    """Return the lines of a file; errors name the line.

    start: the token that the decoder starts with, which is no label.
    """
    path, found = Path(source), []
    own = (getattr(tokenizer, "language", None), getattr(tokenizer, "task", None))
    for line, row in json_rows(path):
        where = f"line {line} of {path}"
        audio, text = _said(row, where)
        file = path.parent / audio
        if not file.is_file():
            raise FileNotFoundError(
                f"{where} names the sound {audio!r}, and there is no file {file}: paths are taken "
                "from the folder of the JSON lines"
            )
        _begin_with(tokenizer, row, own, where)
        ids = tokenizer(text)["input_ids"]
        found.append(Transcript(where, file, tuple(ids[1:] if ids[:1] == [start] else ids)))
    if not found:
        raise ValueError(f"{path} holds no line such as {_EXAMPLE}")
    return found


def _said(row: Any, where: str) -> tuple[str, str]:
    """Return the path of the sound and the text of one line."""
    row = row if isinstance(row, dict) else {}
    for key in ("audio", "text"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{where} has no {key!r} that is text: write {_EXAMPLE}")
    if not row["text"].strip():
        raise ValueError(f"{where} has an empty text: say what is to be heard, or leave it out")
    return row["audio"], row["text"]


def _begin_with(tokenizer: Any, row: Mapping[str, Any], own: tuple[Any, Any], where: str) -> None:
    """Have the tokenizer begin a text with the language and the task of a line."""
    asked = {key: row[key] for key in ("language", "task") if row.get(key) is not None}
    if wrong := [key for key, value in asked.items() if not isinstance(value, str)]:
        raise ValueError(f"{where} has a {wrong[0]} that is no text: {asked[wrong[0]]!r}")
    task = own[1] or ("transcribe" if asked else None)
    said = (asked.get("language", own[0]), asked.get("task", task))
    if said == (getattr(tokenizer, "language", None), getattr(tokenizer, "task", None)):
        return
    if not hasattr(tokenizer, "set_prefix_tokens"):
        raise ValueError(f"{where} says a language, and {type(tokenizer).__name__} has none")
    try:
        tokenizer.language, tokenizer.task = said
        tokenizer.set_prefix_tokens()
    except (ValueError, TypeError) as error:  # of a language that the model has no token for
        raise ValueError(f"{where}: {error}") from error
