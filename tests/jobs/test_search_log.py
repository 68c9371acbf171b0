"""A log has each generation once, whatever happened to the process that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_evopress.jobs.search_log import SearchLog, read_log

HISTORY = [{"generation": i, "loss": 1 / (i + 1), "bits_per_weight": 3.0} for i in range(4)]


def _generations(path: Path) -> list[int]:
    return [row["generation"] for row in read_log(path)]


def test_each_generation_is_there_as_soon_as_it_is_known(tmp_path: Path) -> None:
    log = SearchLog(tmp_path / "search" / "x.jsonl")
    for n in range(1, 5):
        log.update(HISTORY[:n])
        log.update(HISTORY[:n])
        assert _generations(log.path) == list(range(n))
    assert all("time" in row for row in read_log(log.path))


def test_a_resumed_search_adds_what_is_new(tmp_path: Path) -> None:
    SearchLog(tmp_path / "x.jsonl").update(HISTORY[:2])
    SearchLog(tmp_path / "x.jsonl").update(HISTORY)
    assert _generations(tmp_path / "x.jsonl") == [0, 1, 2, 3]


def test_half_a_line_of_a_killed_process_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    SearchLog(path).update(HISTORY[:2])
    path.write_text(path.read_text()[:-9])
    SearchLog(path).update(HISTORY)
    assert _generations(path) == [0, 1, 2, 3]


def test_a_search_that_starts_anew_starts_its_log_anew(tmp_path: Path) -> None:
    SearchLog(tmp_path / "x.jsonl").update(HISTORY)
    SearchLog(tmp_path / "x.jsonl").update(HISTORY[:1])
    assert _generations(tmp_path / "x.jsonl") == [0]


@pytest.mark.parametrize("text", ['{"generation": 1', "[]", '{"loss": 2}'])
def test_a_line_that_is_no_generation_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_log(tmp_path / "x.jsonl")
