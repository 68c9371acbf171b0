"""The same questions with a passage that answers them, alone or among passages that do not.

In-context against closed book is what reading gives; noise is what a retriever brings along.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...base.progress import Tick, silent
from ..flips import Answer
from .closed_book import N_TOKENS, judge
from .questions import Question
from .speaker import Speaker

EXAMPLES = (
    (
        "The lighthouse of Fastnet was finished in 1904 and is the tallest of Ireland.",
        "When was the lighthouse of Fastnet finished?",
        "1904",
    ),
    (
        "The okapi was described by Harry Johnston; its nearest relative is the giraffe.",
        "Who described the okapi?",
        "Harry Johnston",
    ),
)


def answer_from_passages(
    speaker: Speaker,
    questions: Sequence[Question],
    n_noise: int,
    *,
    seed: int = 0,
    tick: Tick = silent,
) -> list[Answer]:
    """Return one answer per question, its passage among n_noise of other questions.

    All questions have passages; those of others and the order depend on `seed` only.
    """
    answers = []
    for number, question in enumerate(questions):
        rng = random.Random(f"{seed} {number} {n_noise}")
        others = [q.passage or "" for q in questions if q.passage != question.passage]
        shown = [question.passage or "", *rng.sample(others, min(n_noise, len(others)))]
        rng.shuffle(shown)
        said = speaker.write(prompt_of(shown, question.question), N_TOKENS)
        answers.append(judge(said, question))
        tick()
    return answers


def prompt_of(passages: Sequence[str], question: str) -> str:
    """Return a question with its passages, after two that are answered from one."""
    shown = "".join(_asked([p], q) + f" {a}\n\n" for p, q, a in EXAMPLES)
    return shown + _asked(passages, question)


def _asked(passages: Sequence[str], question: str) -> str:
    lines = "".join(f"Passage: {passage}\n" for passage in passages)
    return f"{lines}Question: {question}\nAnswer:"
