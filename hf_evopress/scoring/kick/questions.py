"""Questions and documents of the probes: a small built-in set, JSON-lines files, lm-eval's tasks.

One JSON object per line, either a question or a document to be summarised:

    {"question": "Which city is the capital of Japan?", "answers": ["Tokyo"],
     "choices": ["Tokyo", "Osaka"], "passage": "Tokyo has been the capital since 1868."}
    {"document": "A text of some paragraphs ..."}

choices (with the first answer among them) and passage (which holds the answer) may be missing: then
the question takes no part in the probes that need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.plugins import did_you_mean
from ..tasks import TaskRequest, check_tasks

BUILT_IN = Path(__file__).with_name("questions.jsonl")
KEYS = ("question", "answers", "choices", "passage", "document")


@dataclass(frozen=True)
class Question:
    """A question with its right answers in all spellings that count, the usual one first."""

    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    passage: str | None = None

    def __post_init__(self) -> None:
        if not self.question or not self.answers or not all(self.answers):
            raise ValueError(f"a question needs text and answers, got {self.question!r:.80}")
        if self.choices and (self.answers[0] not in self.choices or len(self.choices) < 2):
            raise ValueError(
                f"the first answer is one of two choices or more: {self.answers[0]!r} is not in "
                f"{list(self.choices)}"
            )


@dataclass(frozen=True)
class KickSet:
    """What the probes ask: questions, and documents to be summarised."""

    questions: tuple[Question, ...] = ()
    documents: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.questions and not self.documents:
            raise ValueError("there is neither a question nor a document to ask about")

    def first(self, n: int | None) -> KickSet:
        """Return the first n questions and the first n documents; all for None."""
        return KickSet(self.questions[:n], self.documents[:n])


def read_questions(path: str | Path = BUILT_IN) -> KickSet:
    """Return what a JSON-lines file holds; ValueError names the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of questions (JSON lines)")
    questions: list[Question] = []
    documents: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = _entry(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if isinstance(found, str):
            documents.append(found)
        else:
            questions.append(found)
    if not questions and not documents:
        raise ValueError(f"{path} holds neither a question nor a document")
    return KickSet(tuple(questions), tuple(documents))


def _entry(values: Any) -> Question | str:
    if not isinstance(values, Mapping):
        raise TypeError(f"a line is a JSON object, got {type(values).__name__}")
    for key in values:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), list(KEYS))}")
    if (document := values.get("document")) is not None:
        if not isinstance(document, str) or not document.strip() or len(values) > 1:
            raise ValueError("a document is a text, on a line of its own")
        return document
    passage = values.get("passage")
    if not isinstance(values.get("question"), str) or not isinstance(passage, str | None):
        raise TypeError("question and passage are texts")
    return Question(
        values["question"].strip(),
        _texts("answers", values.get("answers")),
        _texts("choices", values.get("choices", ())),
        passage,
    )


def _texts(key: str, value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise TypeError(f"{key} is a list of texts, got {value!r:.80}")
    return tuple(v.strip() for v in values)


def questions_of_tasks(
    names: Iterable[str], *, include_path: Iterable[str] = (), limit: int | None = None
) -> KickSet:
    """Return the multiple-choice questions of tasks of lm-evaluation-harness, at most `limit` each.

    They have choices and no passages. Tasks that are no multiple choice raise ValueError.
    """
    manager = check_tasks(TaskRequest(tuple(names), tuple(include_path)))
    questions: list[Question] = []
    for name, task in _loaded(manager, manager.match_tasks(list(names))).items():
        kind = getattr(task, "OUTPUT_TYPE", type(task).__name__)
        if kind != "multiple_choice":
            raise ValueError(f"task {name} is {kind}; questions come from multiple choice")
        for _, doc in zip(range(limit or 10**9), task.eval_docs, strict=False):
            questions.append(_question_of(task, doc))
    return KickSet(tuple(questions))


def _loaded(manager: Any, names: list[str]) -> dict[str, Any]:
    if hasattr(manager, "load"):  # from 0.4.12 or so on
        return dict(manager.load(names)["tasks"])
    from lm_eval.tasks import get_task_dict

    return dict(get_task_dict(names, manager))


def _question_of(task: Any, doc: Any) -> Question:
    choices = tuple(str(c).strip() for c in task.doc_to_choice(doc))
    target = task.doc_to_target(doc)
    right = choices[target] if isinstance(target, int) else str(target).strip()
    text = str(task.doc_to_text(doc)).strip()
    text = text.removeprefix("Question:").removesuffix("Answer:").strip()
    return Question(text, (right,), choices)
