"""Each generation reaches the callbacks of transformers once, with its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_evopress.jobs.reporting import Reports

HISTORY = [
    {"generation": i, "loss": 1 / (i + 1), "bits_per_weight": 3.0, "accepted": True, "best": None}
    for i in range(3)
]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("begin", args.output_dir))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append((state.global_step, logs["search/loss"], sorted(logs)))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(("end",))

    name = "transformers.integrations.get_reporting_integration_callbacks"
    monkeypatch.setattr(name, lambda x: [Recorder])
    return seen


def test_each_generation_is_sent_once_as_a_step(events: list[Any], tmp_path: Path) -> None:
    reports = Reports(["recorder"], tmp_path)
    reports.update(HISTORY[:2])
    reports.update(HISTORY)
    reports.close()
    names = ["search/accepted", "search/bits_per_weight", "search/generation", "search/loss"]
    assert events == [
        ("begin", str(tmp_path)),
        *((i, 1 / (i + 1), names) for i in range(3)),
        ("end",),
    ]


def test_without_names_nothing_is_sent(tmp_path: Path) -> None:
    reports = Reports((), tmp_path)
    reports.update(HISTORY)
    reports.close()
    assert reports.callbacks == []


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not supported"):
        Reports(["nowhere"], tmp_path)
