"""What `evaluate` prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_evopress.cli import app
from hf_evopress.scoring.kick.questions import BUILT_IN


@pytest.fixture
def model(tmp_path: Path, tiny_model: Any, byte_tokenizer: Any) -> Path:
    tiny_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_probes_are_told_in_sentences_with_their_errors(model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = BUILT_IN.read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if {"choices", "passage"} <= set(json.loads(line)))
    questions.write_text(first + "\n", encoding="utf-8")
    words = ["evaluate", str(model), "--against", str(model), "--kick-data", str(questions)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert done.exit_code == 0, (done.output, done.exception)
    told = " ".join(done.output.split())
    assert "of 1 question:" in told and "± 0.0 % right; dense" in told
    assert "0.0 % of answers changed" in told and "difference +0.0 ± 0.0 %" in told
    assert "KL 0.0000 nats; same top-1 100.0 %" in told and "+0.0 % by reading" in told
