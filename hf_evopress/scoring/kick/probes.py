"""Run all probes on a model and, if it is given, on the dense one: LLM-KICK's table.

Perplexity stays while facts go. On the built-in questions, a few dozen, shares are coarse: the
figures to look at are those of agreement, flips and KL, which use every answer and need no right
one. Small models answer hardly any question from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ...base.progress import Progress
from ..flips import Answer, accuracy, count_flips
from .answer_tokens import agreement
from .choices import choose, mean_kl
from .closed_book import answer_from_memory
from .in_context import answer_from_passages
from .questions import KickSet, Question
from .speaker import Speaker
from .summaries import rouge_l, summarise

NOISE = (2, 6)  # passages that do not answer, beside the one that does
Ask = Callable[[Speaker, Sequence[Question]], list[Answer]]
Probe = tuple[str, Callable[[], dict[str, Any]]]


def kick(
    compressed: Speaker,
    dense: Speaker | None,
    data: KickSet,
    *,
    noise: Sequence[int] = NOISE,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Return probe -> figures; probes for which `data` has nothing are left out.

    With `dense`: its figures under dense_..., flips, agreement at the answers, and ROUGE-L of
    the summaries against its own, for which there is no figure without it.
    """
    probes = list(_probes(compressed, dense, data, noise))
    found = {}
    for number, (name, probe) in enumerate(probes):
        if progress:
            progress(f"kick: {name}", number, len(probes))
        found[name] = probe()
    if progress and probes:
        progress("kick", len(probes), len(probes))
    return found


def _probes(
    compressed: Speaker, dense: Speaker | None, data: KickSet, noise: Sequence[int]
) -> Iterator[Probe]:
    asked = partial(_asked, compressed, dense)
    if data.questions:
        yield "closed book", lambda: asked(answer_from_memory, data.questions)
    if chosen := [q for q in data.questions if q.choices]:
        yield "choices", lambda: _chosen(compressed, dense, chosen)
    if read := [q for q in data.questions if q.passage]:
        yield "in context", lambda: _read(compressed, dense, read)
        for n in noise:
            ask = partial(answer_from_passages, n_noise=n)
            yield f"in context, {n} other passages", partial(asked, ask, read)
    if data.questions and dense is not None:
        yield "answer tokens", lambda: agreement(dense, compressed, data.questions)
    if data.documents and dense is not None:
        yield "summaries", lambda: _summaries(compressed, dense, data.documents)


def _asked(
    compressed: Speaker, dense: Speaker | None, ask: Ask, questions: Sequence[Question]
) -> dict[str, Any]:
    answers = ask(compressed, questions)
    return _compared(answers, None if dense is None else ask(dense, questions))


def _compared(answers: Sequence[Answer], dense: Sequence[Answer] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"n_questions": len(answers), "accuracy": accuracy(answers)}
    if dense is None:
        return found
    flips = count_flips(dense, answers).to_dict()
    flips.pop("n_answers")
    return {**found, "dense_accuracy": accuracy(dense), **flips}


def _read(
    compressed: Speaker, dense: Speaker | None, questions: Sequence[Question]
) -> dict[str, Any]:
    """Return how passages are read, and what that gains over closed book on the same questions."""
    found = _asked(compressed, dense, partial(answer_from_passages, n_noise=0), questions)
    memory = _asked(compressed, dense, answer_from_memory, questions)
    for gain, share in (("gain", "accuracy"), ("dense_gain", "dense_accuracy")):
        if share in found:
            found[gain] = found[share] - memory[share]
    return found


def _chosen(
    compressed: Speaker, dense: Speaker | None, questions: Sequence[Question]
) -> dict[str, Any]:
    ours = choose(compressed, questions)
    if dense is None:
        return _compared([answer for answer, _ in ours], None)
    theirs = choose(dense, questions)
    found = _compared([answer for answer, _ in ours], [answer for answer, _ in theirs])
    return {**found, "kl_nats": mean_kl([p for _, p in theirs], [q for _, q in ours])}


def _summaries(compressed: Speaker, dense: Speaker, documents: Sequence[str]) -> dict[str, Any]:
    theirs, ours = summarise(dense, documents), summarise(compressed, documents)
    scores = [rouge_l(a, b) for a, b in zip(theirs, ours, strict=True)]
    return {
        "n_documents": len(documents),
        "rouge_l": sum(scores) / len(scores),
        "changed": sum(a != b for a, b in zip(theirs, ours, strict=True)) / len(scores),
    }
