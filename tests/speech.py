"""A tiny Whisper of random weights with its tokenizer, and sounds with what is said in them."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

from tests.conftest import byte_level_tokenizer

RATE, N_PLACES = 16000, 25
START, END = 257, 256
SPECIAL = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>", "<|translate|>",
    "<|transcribe|>", "<|notimestamps|>",
)  # fmt: skip
SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
SETTINGS: dict[str, Any] = {
    **SIDES, "d_model": 32, "vocab_size": 264, "num_mel_bins": 8, "max_source_positions": N_PLACES,
    "max_target_positions": 64, "decoder_start_token_id": START, "eos_token_id": END,
    "pad_token_id": END, "bos_token_id": END, "begin_suppress_tokens": None,
}  # fmt: skip


def whisper() -> Any:
    """Return a tiny Whisper whose weights are large enough to lose something."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SETTINGS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
    return model.eval()


def save(folder: Path) -> None:
    """Write the model, its tokenizer and its feature extractor."""
    whisper().to(torch.bfloat16).save_pretrained(folder)
    known = byte_level_tokenizer().get_vocab()
    vocab = {("<zero>" if i == 0 else word): i for word, i in known.items()}
    vocab |= {word: 256 + i for i, word in enumerate(SPECIAL)}
    words = WhisperTokenizer(
        vocab=vocab, merges=[], extra_special_tokens=list(SPECIAL), language="en", task="transcribe"
    )
    spectrum = WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=320, chunk_length=1, n_fft=400
    )
    WhisperProcessor(feature_extractor=spectrum, tokenizer=words).save_pretrained(folder)


def sing(
    path: Path, number: int, *, seconds: float = 0.6, rate: int = RATE, channels: int = 1
) -> None:
    """Write a WAV file of a tone that no other number has, with noise."""
    noise = np.random.default_rng(number)
    n = round(seconds * rate)
    tone = 0.3 * np.sin(2 * np.pi * (200 + 90 * number) * np.arange(n) / rate)
    samples = np.repeat((tone + 0.02 * noise.standard_normal(n))[:, None], channels, axis=1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 2**15).astype("<i2").tobytes())


def write_calls(here: Path, text: str, n: int = 16) -> Path:
    """Write `n` sounds and calls.jsonl with what is said in them, of different lengths."""
    (here / "sounds").mkdir()
    lines = []
    for i in range(n):
        sing(here / f"sounds/{i}.wav", i)
        said = text[20 * i : 20 * i + 12 + i % 5]
        lines.append(json.dumps({"audio": f"sounds/{i}.wav", "text": said}))
    (here / "calls.jsonl").write_text("\n".join(lines) + "\n")
    return here / "calls.jsonl"
