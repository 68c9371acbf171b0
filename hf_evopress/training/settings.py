"""What `tune` trains, on how much text, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.plugins import did_you_mean
from .tunable import KINDS

CODES = "codes"

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@dataclass(frozen=True)
class Tuning:
    """What is trained and how.

    train: lora, rslora or dora (an adapter), or any of codes, scales, factors, norms and biases,
    joined by commas (the packed model itself); codes by PV-Tuning, alone with scales and norms,
    without which no gradient comes to them. target, of an adapter: all-linear, kappa:SHARE, or
    last parts of module names joined by commas. start: an adapter to train on; beside: one that
    is active and frozen. heldout: sequences that tell, with a teacher, what the training did.
    written: sequences that the teacher writes itself, to learn from as well.
    """

    train: str = "lora"
    target: str = "all-linear"
    rank: int = 16
    alpha: float | None = None  # of the adapter; by default twice the rank
    start: str | None = None
    beside: str | None = None
    teacher: str | None = None
    task_weight: float = 0.0  # cross entropy added to the teacher's divergence
    steps: int = 200
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | None = None  # by default 2e-4 for adapters, 1e-4 for floats
    seq_len: int = 512
    sequences: int = 256
    column: str = "text"  # of tables and datasets, where their text is
    written: int = 0
    every: int = 8  # steps between two changes of codes
    max_change: float = 1e-2  # share of a layer's codes, or tiles of a trellis, that one changes
    trust: float = 2e-2  # most that one changes what the layer computes, relative to it
    heldout: int = 4
    seed: int = 0
    save_steps: int = 50
    gradient_checkpointing: bool = False
    bf16: bool = False

    def __post_init__(self) -> None:
        counts = ("rank", "steps", "batch", "accumulate", "sequences", "heldout", "save_steps")
        for key in (*counts, "every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be 1 or more, got {getattr(self, key)}")
        if self.written < 0 or (self.written and self.teacher is None):
            raise ValueError(f"written text is a teacher's, 0 or more; got {self.written}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not (0 < self.max_change <= 1 and self.trust > 0):
            raise ValueError(
                "max_change is in (0, 1] and trust above 0; got "
                f"max_change={self.max_change}, trust={self.trust}"
            )
        if CODES in (self.kinds or ()) and self.every >= self.steps:
            raise ValueError(
                f"codes change every {self.every} steps, and the run has {self.steps}: give more "
                "steps, or a smaller --every"
            )
        for word in self.kinds or ():
            known = [*ADAPTERS, CODES, *KINDS]
            if word not in known[len(ADAPTERS) :]:
                raise ValueError(
                    f"cannot train {word!r}{did_you_mean(word, known)}; known: {', '.join(known)}"
                )
        if self.kinds and (self.start or self.beside):
            raise ValueError(f"train={self.train} changes the model itself and takes no adapter")
        if self.target.startswith("kappa:"):
            share_of(self.target)

    @property
    def kinds(self) -> list[str] | None:
        """Kinds of the model's own parameters to train, None for an adapter."""
        return None if self.train in ADAPTERS else [w.strip() for w in self.train.split(",")]

    @property
    def floats(self) -> list[str]:
        """Those of `kinds` that are not codes; scales and norms where there are no others."""
        return [kind for kind in self.kinds or () if kind != CODES] or ["scales", "norms"]


def share_of(target: str) -> float:
    """Return the share of the layers that a target of kappa:SHARE names."""
    try:
        share = float(target.removeprefix("kappa:"))
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ValueError(f"kappa takes a share of the layers, such as kappa:0.2; got {target!r}")
    return share
