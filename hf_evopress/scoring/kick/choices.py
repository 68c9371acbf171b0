"""Multiple choice by likelihood: accuracy, flips, and KL over the choices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...base.progress import Tick, silent
from ..flips import Answer
from .closed_book import prompt_of
from .questions import Question
from .speaker import Speaker


def choose(
    speaker: Speaker, questions: Sequence[Question], *, tick: Tick = silent
) -> list[tuple[Answer, Tensor]]:
    """Return for each question with choices the likeliest one, and the log-probabilities (n,) of
    all, given that it is one of them."""
    found = []
    for question in questions:
        prompt = prompt_of(question.question)
        likely = torch.tensor([speaker.likelihood(prompt, f" {c}") for c in question.choices])
        said = question.choices[int(likely.argmax())]
        found.append((Answer(said, said == question.answers[0]), likely.log_softmax(-1)))
        tick()
    return found


def mean_kl(dense: Sequence[Tensor], compressed: Sequence[Tensor]) -> float:
    """Return the mean KL(dense || compressed) over the choices, in nats."""
    kls = [float((p.exp() * (p - q)).sum()) for p, q in zip(dense, compressed, strict=True)]
    return sum(kls) / len(kls)
