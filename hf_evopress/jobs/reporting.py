"""Report the generations of a search to TensorBoard, trackio, Weights & Biases or others.

Through the reporting callbacks that transformers' Trainer has, by the names of its `report_to`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class Reports:
    """Sends each generation once: its numbers, at its number as the step.

    names: such as tensorboard or trackio; folder: where callbacks that write files put them.
    A search that is resumed sends its generations again. ValueError names an unknown one;
    RuntimeError or ImportError say what is not installed.
    """

    def __init__(self, names: Sequence[str], folder: str | Path) -> None:
        self.callbacks = _callbacks(names) if names else []
        self.folder = str(folder)
        self._told: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None
        self._sent = 0

    def update(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Send the generations that have not been sent."""
        if not self.callbacks:
            return
        if self._told is None:
            from transformers import TrainerControl, TrainerState, TrainingArguments

            arguments = TrainingArguments(output_dir=self.folder, report_to=[])
            self._told = arguments, TrainerState(), TrainerControl()
            self._tell("on_train_begin")
        for row in history[self._sent :]:
            self._told[1].global_step = int(row["generation"])
            logs = {f"search/{k}": v for k, v in row.items() if isinstance(v, int | float)}
            self._tell("on_log", logs=logs)
        self._sent = len(history)

    def close(self) -> None:
        """Let the callbacks write out what they hold."""
        if self._told is not None:
            self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        assert self._told is not None
        for callback in self.callbacks:
            getattr(callback, event)(*self._told, **more)


def _callbacks(names: Sequence[str]) -> list[Any]:
    from transformers.integrations import get_reporting_integration_callbacks

    return [callback() for callback in get_reporting_integration_callbacks(list(names))]
