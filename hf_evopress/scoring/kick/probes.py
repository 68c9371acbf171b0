"""Run all probes on a model and, if it is given, on the dense one: LLM-KICK's table.

Perplexity stays while facts go. On the built-in questions, a few dozen, shares are coarse: the
figures to look at are those of agreement, flips and KL, which use every answer and need no right
one. Small models answer hardly any question from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ...base.progress import Progress, Tick, silent
from ..flips import Answer, accuracy, count_flips, difference_error, standard_error
from .answer_tokens import agreement
from .choices import choose, mean_kl
from .closed_book import answer_from_memory
from .in_context import answer_from_passages
from .questions import KickSet, Question
from .speaker import Speaker
from .summaries import rouge_l, summarise

NOISE = (2, 6)  # passages that do not answer, beside the one that does
Figures = dict[str, Any]


class Ask(Protocol):
    """How questions are asked: answers of one model, one per question."""

    def __call__(
        self, speaker: Speaker, questions: Sequence[Question], *, tick: Tick = silent
    ) -> list[Answer]: ...


@dataclass(frozen=True)
class Probe:
    """A name, how many questions and documents are put, over all models, and how to put them."""

    name: str
    n_asked: int
    run: Callable[..., Figures]


def kick(
    compressed: Speaker,
    dense: Speaker | None,
    data: KickSet,
    *,
    noise: Sequence[int] = NOISE,
    progress: Progress | None = None,
) -> dict[str, Figures]:
    """Return probe -> figures; probes for which `data` has nothing are left out.

    With `dense`: its figures under dense_..., flips, agreement at the answers, and ROUGE-L of
    the summaries against its own, for which there is no figure without it. Accuracies have their
    standard errors: of the model's own, and of its difference from the dense one's, paired.
    """
    probes = list(_probes(compressed, dense, data, noise))
    total, done, found = sum(probe.n_asked for probe in probes), 0, {}
    for probe in probes:
        after = done + probe.n_asked

        def tick(label: str = f"kick: {probe.name}") -> None:
            nonlocal done
            done += 1
            if progress:
                progress(label, done, total)

        found[probe.name] = probe.run(tick=tick)
        done = after  # of a model compared with itself, one is asked
    if progress and probes:
        progress("kick", total, total)
    return found


def _probes(
    compressed: Speaker, dense: Speaker | None, data: KickSet, noise: Sequence[int]
) -> Iterator[Probe]:
    n_models = 1 if dense is None else 2
    from_memory = _Remembering()
    asked = partial(_asked, compressed, dense)
    if data.questions:
        n = n_models * len(data.questions)
        yield Probe("closed book", n, partial(asked, from_memory, data.questions))
    if chosen := [q for q in data.questions if q.choices]:
        n = n_models * len(chosen)
        yield Probe("choices", n, partial(_chosen, compressed, dense, chosen))
    if read := [q for q in data.questions if q.passage]:
        n = n_models * len(read)
        yield Probe("in context", n, partial(_read, compressed, dense, from_memory, read))
        for n_noise in noise:
            ask = partial(answer_from_passages, n_noise=n_noise)
            yield Probe(f"in context, {n_noise} other passages", n, partial(asked, ask, read))
    if data.questions and dense is not None:
        run = partial(agreement, dense, compressed, data.questions)
        yield Probe("answer tokens", len(data.questions), run)
    if data.documents and dense is not None:
        run = partial(_summaries, compressed, dense, data.documents)
        yield Probe("summaries", n_models * len(data.documents), run)


class _Remembering:
    """Closed book, where a model is asked once: what reading gains is counted from it, too."""

    def __init__(self) -> None:
        self._answers: dict[Speaker, dict[Question, Answer]] = {}

    def __call__(
        self, speaker: Speaker, questions: Sequence[Question], *, tick: Tick = silent
    ) -> list[Answer]:
        known = self._answers.setdefault(speaker, {})
        if any(q not in known for q in questions):
            answers = answer_from_memory(speaker, questions, tick=tick)
            known.update(zip(questions, answers, strict=True))
        return [known[q] for q in questions]


def _asked(
    compressed: Speaker,
    dense: Speaker | None,
    ask: Ask,
    questions: Sequence[Question],
    *,
    tick: Tick = silent,
) -> Figures:
    answers = ask(compressed, questions, tick=tick)
    return _compared(answers, None if dense is None else ask(dense, questions, tick=tick))


def _compared(answers: Sequence[Answer], dense: Sequence[Answer] | None) -> Figures:
    found: Figures = {
        "n_questions": len(answers),
        "accuracy": accuracy(answers),
        "accuracy_standard_error": standard_error(answers),
    }
    if dense is None:
        return found
    flips = count_flips(dense, answers)
    found |= {"dense_accuracy": accuracy(dense), **flips.to_dict()}
    found["difference"] = found["accuracy"] - found["dense_accuracy"]
    found["difference_standard_error"] = difference_error(flips)
    del found["n_answers"]
    return found


def _read(
    compressed: Speaker,
    dense: Speaker | None,
    from_memory: Ask,
    questions: Sequence[Question],
    *,
    tick: Tick = silent,
) -> Figures:
    """Return how passages are read, and what that gains over closed book on the same questions."""
    passages = partial(answer_from_passages, n_noise=0)
    found = _asked(compressed, dense, passages, questions, tick=tick)
    memory = _asked(compressed, dense, from_memory, questions)
    for gain, share in (("gain", "accuracy"), ("dense_gain", "dense_accuracy")):
        if share in found:
            found[gain] = found[share] - memory[share]
    return found


def _chosen(
    compressed: Speaker,
    dense: Speaker | None,
    questions: Sequence[Question],
    *,
    tick: Tick = silent,
) -> Figures:
    ours = choose(compressed, questions, tick=tick)
    if dense is None:
        return _compared([answer for answer, _ in ours], None)
    theirs = choose(dense, questions, tick=tick)
    found = _compared([answer for answer, _ in ours], [answer for answer, _ in theirs])
    return {**found, "kl_nats": mean_kl([p for _, p in theirs], [q for _, q in ours])}


def _summaries(
    compressed: Speaker, dense: Speaker, documents: Sequence[str], *, tick: Tick = silent
) -> Figures:
    theirs = summarise(dense, documents, tick=tick)
    ours = summarise(compressed, documents, tick=tick)
    scores = [rouge_l(a, b) for a, b in zip(theirs, ours, strict=True)]
    return {
        "n_documents": len(documents),
        "rouge_l": sum(scores) / len(scores),
        "changed": sum(a != b for a, b in zip(theirs, ours, strict=True)) / len(scores),
    }
