"""Sound files: WAV by Python itself, other formats by soundfile, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf_evopress.calibration.sound_files import read_sound
from tests.speech import RATE, sing


def test_channels_of_a_wav_file_are_averaged(tmp_path: Path) -> None:
    sing(tmp_path / "one.wav", 3)
    sing(tmp_path / "two.wav", 3, channels=2)
    one, two = (read_sound(tmp_path / f"{n}.wav", RATE, most_seconds=1) for n in ("one", "two"))
    assert one.shape == (round(0.6 * RATE),) and one.dtype == np.float32
    assert 0.2 < np.abs(one).max() < 0.5 and np.allclose(one, two, atol=1e-6)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    def fails(message: str, name: str = "a.wav") -> None:
        with pytest.raises(ValueError, match=message):
            read_sound(tmp_path / name, RATE, most_seconds=1)

    sing(tmp_path / "a.wav", 0, rate=44100)
    fails(r"a.wav has 44100 samples per second, the model hears 16000: .*-ar 16000 -c:a pcm_s16le")
    sing(tmp_path / "a.wav", 0, seconds=1.5)
    fails("a.wav lasts 1.50 seconds, the model hears 1 at once: cut it,")
    sing(tmp_path / "a.wav", 0, seconds=0)
    fails("a.wav holds no sound")
    sing(tmp_path / "a.wav", 0)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[:5000])
    fails("a.wav ends before its 9600 samples do: it is damaged")


def test_another_format_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(b"ID3" + bytes(64))
    with pytest.raises(ValueError, match=r"a.mp3.*(\[speech\]|no sound that soundfile reads)"):
        read_sound(tmp_path / "a.mp3", RATE, most_seconds=1)


def test_soundfile_reads_what_wave_does_not(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    sing(tmp_path / "a.wav", 1, channels=2)
    wav = read_sound(tmp_path / "a.wav", RATE, most_seconds=1)
    samples, rate = soundfile.read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "a.flac", samples, rate)
    assert np.allclose(read_sound(tmp_path / "a.flac", RATE, most_seconds=1), wav, atol=1e-6)
    samples[7] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="nan.wav holds NaN or infinity"):
        read_sound(tmp_path / "nan.wav", RATE, most_seconds=1)
