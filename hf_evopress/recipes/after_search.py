"""What a recipe says of the time after the search: an adapter, learning end to end, training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..base.resources import parse_size
from .checks import at_least


@dataclass(frozen=True)
class Adapter:
    """An EoRA adapter for the finished model, written to OUT-eora."""

    sources: tuple[str, ...] = ()  # text of the task; none: that of `data`
    rank: int | None = None  # the same for every layer
    size: str | None = None  # bytes of the file, such as 8MB: ranks are chosen to fit it best
    error: float | None = None  # share of its output that each layer may get wrong
    prefix: bool = False  # make up for the errors of earlier layers as well
    calibration: int = 64  # sequences

    def __post_init__(self) -> None:
        said = [k for k in ("rank", "size", "error") if getattr(self, k) is not None]
        if len(said) != 1:
            raise ValueError(f"an adapter needs one of rank, size or error; got {said or 'none'}")
        if self.size is not None:
            parse_size(self.size)
        at_least(self, 1, "calibration")


CODES_EVERY = 8  # steps


@dataclass(frozen=True)
class Distil:
    """How long a model learns from the dense one where refine says end-to-end."""

    steps: int = 200  # of one sequence each
    learning_rate: float | None = None  # none: 1e-4
    codes: bool = False  # codes and walks move as well, every 8 steps (PV-Tuning)

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        if self.codes and self.steps <= CODES_EVERY:
            raise ValueError(
                f"codes change every {CODES_EVERY} steps, and distil.steps is {self.steps}: give "
                "more steps"
            )
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"distil.learning_rate must be above 0, got {self.learning_rate}")


@dataclass(frozen=True)
class Tune:
    """A training run on the finished model, written to OUT-tuned."""

    sources: tuple[str, ...] = ()  # text to train on; none: that of `data`
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `hf-evopress tune`
