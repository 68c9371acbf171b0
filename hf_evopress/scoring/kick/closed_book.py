"""Factoid questions from memory: the share of exact matches, and flips.

What pruning takes first (LLM-KICK, section 3.1): facts that were seen rarely.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from ...base.progress import Tick, silent
from ..flips import Answer
from .questions import Question
from .speaker import Speaker

N_TOKENS = 16
EXAMPLES = (
    ("Which planet is the largest of the solar system?", "Jupiter"),
    ("Who wrote the novel Moby-Dick?", "Herman Melville"),
    ("In which country are the pyramids of Giza?", "Egypt"),
)


def prompt_of(question: str) -> str:
    """Return a question after three that are answered."""
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in EXAMPLES)
    return f"{shown}Question: {question}\nAnswer:"


def answer_from_memory(
    speaker: Speaker, questions: Sequence[Question], *, tick: Tick = silent
) -> list[Answer]:
    """Return one answer per question."""
    answers = []
    for question in questions:
        answers.append(judge(speaker.write(prompt_of(question.question), N_TOKENS), question))
        tick()
    return answers


def judge(said: str, question: Question) -> Answer:
    """Return an answer, right if it is one of the question's but for case, articles and dots."""
    plain = plain_text(said)
    return Answer(plain, any(plain == plain_text(right) for right in question.answers))


def plain_text(text: str) -> str:
    """Return `text` as SQuAD compares answers: lower case, no articles, no punctuation."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
