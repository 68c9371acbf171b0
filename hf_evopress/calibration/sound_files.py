"""Read a sound file: WAV of 16-bit PCM by Python itself, other formats where soundfile is there."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

_CONVERT = "ffmpeg -i {} -ac 1 -ar {} -c:a pcm_s16le NEW.wav"


def read_sound(path: Path, rate: int, *, most_seconds: float) -> np.ndarray:
    """Return the samples (n,) float32 of a sound file, its channels averaged.

    Raises ValueError for another sampling rate than `rate`, which nothing here changes, for a
    sound that is empty, longer than `most_seconds` or not all numbers, and for a damaged file.
    """
    samples, own_rate = _wav(path) or _other(path, rate)
    if own_rate != rate:
        raise ValueError(
            f"{path} has {own_rate} samples per second, the model hears {rate}: convert it, for "
            f"example by {_CONVERT.format(path.name, rate)}"
        )
    if not len(samples):
        raise ValueError(f"{path} holds no sound")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds NaN or infinity: it is damaged")
    if (seconds := len(samples) / rate) > most_seconds:
        raise ValueError(
            f"{path} lasts {seconds:.2f} seconds, the model hears {most_seconds:g} at once: cut "
            "it, and what is said, into pieces"
        )
    return samples.mean(axis=1, dtype=np.float32)


def _wav(path: Path) -> tuple[np.ndarray, int] | None:
    """Return the samples (n, channels) of a WAV file of 16-bit PCM and its rate, else None."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                return None
            channels, rate, n = file.getnchannels(), file.getframerate(), file.getnframes()
            frames = file.readframes(n)
    except (wave.Error, EOFError):
        return None
    if len(frames) != 2 * channels * n:
        raise ValueError(f"{path} ends before its {n} samples do: it is damaged")
    samples = np.frombuffer(frames, "<i2").reshape(-1, channels)
    return samples.astype(np.float32) / 2**15, rate


def _other(path: Path, rate: int) -> tuple[np.ndarray, int]:
    """Return the samples (n, channels) of a file in another format, and its rate."""
    try:
        import soundfile
    except ImportError as error:
        raise ValueError(
            f"{path} is no WAV file of 16-bit PCM: convert it, for example by "
            f'{_CONVERT.format(path.name, rate)}, or pip install "hf-evopress[speech]"'
        ) from error
    try:
        samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(
            f"{path} is no sound that soundfile reads ({error}): convert it, for example by "
            f"{_CONVERT.format(path.name, rate)}"
        ) from error
    return samples, int(own_rate)
