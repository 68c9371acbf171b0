"""The log of a search, one JSON object per line and generation, written as it happens.

    tail -f work/search/*.jsonl          hf-evopress show work/search/1a2b.jsonl --plot curve.png

A search that goes on where it was stopped adds only what is new.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.full_disk import space_for
from ..base.reading import read_object, reading

ENDING = ".jsonl"


class SearchLog:
    """Appends the generations of a search's history to a file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._written: int | None = None

    def update(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the generations that the file does not have yet, with the time in seconds."""
        if self._written is None:
            self._written = self._resumed(len(history))
        lines = [json.dumps({**row, "time": round(time.time(), 1)}) for row in history]
        if new := lines[self._written :]:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with space_for(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in new))
            self._written = len(history)

    def _resumed(self, n_known: int) -> int:
        """Return how many lines stay: a process that was killed may have left half a line, and
        a search that starts anew has a new history."""
        if not self.path.is_file():
            return 0
        whole = [line for line in self.path.read_text(encoding="utf-8").splitlines(True) if line]
        kept = [line for line in whole if line.endswith("\n")][:n_known]
        if kept != whole:
            self.path.write_text("".join(kept), encoding="utf-8")
        return len(kept)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Return the generations in a log; ValueError names a line that is none."""
    rows = []
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        with reading(f"{path}, line {number}"):
            row = json.loads(line)
        if not isinstance(row, dict) or not {"generation", "loss"} <= set(row):
            raise ValueError(f"{path}, line {number} lacks 'generation' or 'loss'")
        rows.append(row)
    return rows


def read_state(path: Path) -> dict[str, Any] | None:
    """Return the state of a search that was stopped, None where there is none."""
    if not path.is_file():
        return None
    return read_object(path, way_out="it is damaged; delete it to search anew")
