"""Sounds and what is said in them, as token sequences; and lines that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from hf_evopress.calibration.transcripts import SoundText, has_sounds, read_sounds
from tests.speech import END, N_PLACES, RATE, save, sing, write_calls

ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, PLAIN = 258, 260, 261, 262, 263


@pytest.fixture(scope="module")
def home(structured_text: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dense/, calls.jsonl and sounds/."""
    here = tmp_path_factory.mktemp("calls")
    save(here / "dense")
    write_calls(here, structured_text(60), n=6)
    return here


def made_of(home: Path, *rows: Any, **more: Any) -> SoundText:
    """Return what makes sequences of these lines, of all that there are by default."""
    file = home / "calls.jsonl"
    if rows:
        file = home / "some.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
    config = AutoConfig.from_pretrained(home / "dense")
    return read_sounds(home / "dense", config, [file], **{"seq_len": 1024, **more})


def test_a_sequence_is_one_sound_and_its_words_to_the_longest(home: Path) -> None:
    made = made_of(home)
    said = [json.loads(line)["text"] for line in (home / "calls.jsonl").read_text().splitlines()]
    longest = max(len(text.encode()) for text in said) + 4  # language, task, no times, end
    assert made.seq_len == longest and made.n_sequences == 6
    rows = made.write(6)
    assert rows.shape == (6, N_PLACES + longest)
    found = set()
    for row in rows:
        words = row[N_PLACES:].tolist()
        text = words[3 : words.index(END)]
        found.add(bytes(text).decode())
        assert words[:3] == [ENGLISH, TRANSCRIBE, PLAIN]
        again = words[words.index(END) + 1 :]
        assert again == words[: len(again)]
        assert len(made.images.counted(row)) == 3 + len(text) + 1
        assert made.images.of(row[None])["input_features"].shape == (1, 8, 2 * N_PLACES)
    assert found == {" ".join([text]) for text in said}
    assert torch.equal(made_of(home).write(6), rows)
    assert made_of(home, seq_len=9).write(2).shape == (2, N_PLACES + 9)


def test_the_same_words_said_twice_are_two_sequences(home: Path) -> None:
    rows = [{"audio": f"sounds/{i}.wav", "text": "yes"} for i in (0, 1, 1)]
    made = made_of(home, *rows)
    assert made.n_sequences == 2 and made.seq_len == 8
    with pytest.raises(ValueError, match=r"some.jsonl has 2 sounds, 3 are needed"):
        made.write(3)


def test_a_line_says_its_language_and_task(home: Path) -> None:
    sound = {"audio": "sounds/0.wav", "text": "ja"}
    lines = [{**sound, "language": "de"}, sound, {**sound, "language": "de", "task": "translate"}]
    begun = [one.ids[:3] for one in made_of(home, *lines).transcripts]
    assert begun == [
        (GERMAN, TRANSCRIBE, PLAIN),
        (ENGLISH, TRANSCRIBE, PLAIN),
        (GERMAN, TRANSLATE, PLAIN),
    ]


def test_what_is_wrong_with_a_line_is_said_with_its_number(home: Path) -> None:
    good = {"audio": "sounds/0.wav", "text": "yes"}

    def fails(row: Any, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=f"line 2 of .*some.jsonl.*{message}"):
            made_of(home, good, row)

    fails(
        {**good, "audio": "no.wav"}, "names the sound 'no.wav', and there is no", FileNotFoundError
    )
    fails({**good, "text": " "}, "has an empty text")
    fails({"audio": "sounds/0.wav"}, "has no 'text' that is text: write .*call.wav")
    fails({**good, "audio": {"bytes": ""}}, "has no 'audio' that is text")
    fails("yes", "has no 'audio'")
    fails({**good, "language": "klingon"}, "Unsupported language: klingon")
    fails({**good, "language": 7}, "has a language that is no text: 7")
    sing(home / "sounds/slow.wav", 0, rate=8000)
    fails({**good, "audio": "sounds/slow.wav"}, f"8000 samples per second, the model hears {RATE}")
    config = AutoConfig.from_pretrained(home / "dense")
    (home / "some.jsonl").write_text('{"audio": "sounds/0.wav", "text": "a"}\n{')
    with pytest.raises(ValueError, match="line 2 of .*some.jsonl is not valid JSON"):
        read_sounds(home / "dense", config, [home / "some.jsonl"], seq_len=8)


def test_another_models_feature_extractor_is_named(home: Path) -> None:
    config = AutoConfig.from_pretrained(home / "dense")
    config.num_mel_bins = 80
    made = read_sounds(home / "dense", config, [home / "calls.jsonl"], seq_len=64)
    with pytest.raises(ValueError, match=r"makes \(8, 50\) .*the model reads \(80, 50\)"):
        made.write(1)


def test_a_source_of_text_is_none_of_sound(home: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "no sound"}\n')
    assert has_sounds(home / "calls.jsonl") and not has_sounds(tmp_path / "text.jsonl")
    config = AutoConfig.from_pretrained(home / "dense")
    for sources, said in (([str(tmp_path / "text.jsonl")], "text.jsonl"), ([], "none")):
        with pytest.raises(ValueError, match=f"hears sound: give one file .* got .*{said}"):
            read_sounds(home / "dense", config, sources, seq_len=64)
