from __future__ import annotations

from pathlib import Path

import pytest

from tests.fetch_demo import NOVEL, main, pieces, write_text


def test_pieces_keep_every_paragraph_in_order() -> None:
    paragraphs = [f"paragraph {i} " + "x" * (37 * i % 101) for i in range(50)]
    made = pieces("\n\n".join(paragraphs), 7)
    assert len(made) == 7
    assert "\n\n".join(made).split("\n\n") == paragraphs


def test_every_tenth_of_the_demo_text_holds_all_three_kinds(tmp_path: Path) -> None:
    write_text(tmp_path / "demo.txt")
    text = (tmp_path / "demo.txt").read_text(encoding="utf-8")
    step = len(text) // 10
    for start in range(0, len(text) - step, step):
        part = text[start : start + step]
        assert "Python" in part or "object" in part
        assert "    return" in part and "def " in part
        assert "Red Shirt" in part or "Porcupine" in part or "Kiyo" in part or "Master" in part
    assert [p.name for p in tmp_path.iterdir()] == ["demo.txt"]


def test_the_novel_is_free_of_trademarks_and_licence_text() -> None:
    text = NOVEL.read_text(encoding="utf-8")
    assert "gutenberg" not in text.lower()
    assert "license" not in text.lower()
    assert len(text) > 250_000


def test_an_unknown_job_shows_the_usage() -> None:
    with pytest.raises(SystemExit, match="usage"):
        main(["weights", "somewhere"])
