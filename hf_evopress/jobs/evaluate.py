"""Evaluate a model: perplexity on a text, stored size, tasks, what it still knows (LLM-KICK)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.by_name import is_gguf, load, pinned, plan_of, tokenizer_of
from ..base.devices import on_device
from ..base.own_code import trusts_code
from ..base.progress import Progress
from ..calibration.class_tokens import file_tokens
from ..calibration.transcripts import read_sounds
from ..loading.layers import prepare_layers
from ..loading.quantizer import register_with_transformers
from ..loading.runtimes import EXPANDED, PACKED
from ..models.classes import ModelClass, set_pooling, text_length
from ..models.images import give_images
from ..models.pooling import pooling_said
from ..models.size import model_size, stored_bytes
from ..models.sounds import Sounds
from ..models.source import (
    is_decoder,
    kind_of,
    load_checked,
    read_config,
    read_tokenizer,
    window_of,
)
from ..plans.plan import Plan
from ..scoring.compare_outputs import compare_outputs
from ..scoring.evaluate import Report, compare
from ..scoring.kick.probes import kick
from ..scoring.kick.questions import BUILT_IN, KickSet, questions_of_tasks, read_questions
from ..scoring.kick.speaker import Speaker
from ..scoring.tasks import TaskRequest, check_tasks, run_tasks
from ..sharing.cards import CARD, is_ours, write_card
from ..sharing.task_results import add_results

TASK = "task:"  # before the name of a task of lm-eval that questions come from


@trusts_code
@on_device
def evaluate_model(
    model: str,
    data: str | None = None,
    *,
    column: str = "text",
    against: str | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    tasks: TaskRequest | None = None,
    questions: KickSet | None = None,
    card: bool = False,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what `model` scores, what it stores, and how far from the dense model `against` it is.

    On the text file `data` (of models that continue no text what their class puts out is compared
    with that of `against`: KL of labels, of masked tokens, of a decoder's predictions, or
    cosine); under "tasks" by tasks of lm-evaluation-harness, with flips; under
    "kick" by the probes of LLM-KICK. Each model is loaded once for all of them, and computes by
    the reference, so that figures are the same on every machine; for "kick", which writes token
    by token, its dense weights are held as long, and those give what the reference does but for
    the order of sums. card: have the results of tasks
    in the card of `model`, a folder of ours.
    """
    register_with_transformers()
    if data is None and tasks is None and questions is None:
        raise ValueError("nothing to evaluate on: give a text (--data), --tasks or --kick")
    if card:
        check_card(model, tasks)
    manager = None if tasks is None else check_tasks(tasks)
    kind = _kind(model, against, tasks is not None or questions is not None)
    text = None if data is None else _text(model, kind, data, column, window, max_windows)
    size = model_size(load_checked(model, kind=kind, dtype="auto")) if text else None  # as stored
    made = load(model, dtype=dtype, kind=kind)
    prepare_layers(made, PACKED)
    against = against and pinned(against, plan_of(made))
    dense = load(against, dtype=dtype, kind=kind) if against else None
    found: dict[str, Any] = {}
    if text is not None and size is not None:
        tokens, window, sounds = text
        on: dict[str, Any] = {"window": window, "max_windows": max_windows, "progress": progress}
        if kind is None or kind.continues_text:
            report = compare(made, dense, tokens, **on)
        else:
            report = compare_class(kind, model, made, dense, tokens, sounds=sounds, **on)
        found |= report.to_dict()
        found["bits_per_weight"] = size.bits_per_weight
        found["bits_per_weight_with_embeddings"] = size.bits_per_weight_with_embeddings
    if Path(model).is_dir():
        found["size_bytes"] = stored_bytes(model)
    if tasks is not None:
        found["tasks"] = _tasks(made, model, dense, against, tasks, manager)
    if questions is not None:
        with _held(made):
            found["kick"] = _kick(made, model, dense, against, questions, progress)
    if card:
        add_results(model, found["tasks"])
        write_card(model)
    return found


def _kick(
    made: Any,
    model: str,
    dense: Any,
    against: str | None,
    questions: KickSet,
    progress: Progress | None,
) -> dict[str, dict[str, Any]]:
    ours = Speaker(made, tokenizer_of(model))
    theirs = None if against is None else Speaker(dense, tokenizer_of(against))
    return kick(ours, theirs, questions, progress=progress)


@contextmanager
def _held(model: Any) -> Iterator[None]:
    """Hold the dense weights of a packed model for a while: the reference makes them at each call,
    for each token that is written."""
    prepare_layers(model, EXPANDED)
    try:
        yield
    finally:
        prepare_layers(model, PACKED)


def compare_class(
    kind: ModelClass,
    name: str,
    model: Any,
    dense: Any,
    tokens: Tensor,
    *,
    window: int,
    max_windows: int | None,
    progress: Progress | None,
    sounds: Sounds | None = None,
) -> Report:
    """Return how far what a model that continues no text puts out is from the dense model.

    sounds: what is said in which the tokens are.
    """
    config = read_config(name)
    for one in (model, dense) if kind.is_vector else ():
        set_pooling(one, pooling_said(name, is_decoder(config)))
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:max_windows]
    for one in (model, dense):
        give_images(one, sounds)
    return compare_outputs(
        {"model": model},
        dense,
        windows,
        is_vector=kind.is_vector,
        rows=None if sounds is None else sounds.counted,
        window=text_length(model, windows),
        progress=progress,
    )["model"]


def _kind(model: str, against: str | None, is_asked: bool) -> ModelClass | None:
    """Return the class of a model, None of a GGUF file; ValueError for what it is not asked."""
    if is_gguf(model):
        return None
    kind = kind_of(read_config(model), model)
    if kind.continues_text:
        return kind
    if is_asked:
        raise ValueError(
            f"tasks and --kick ask models that continue text, and {model} is of class {kind.name}: "
            "give a text (--data) and the dense model (--against)"
        )
    if against is None:
        raise ValueError(
            f"{model} is of class {kind.name}, which is compared with the dense model: give it "
            "with --against"
        )
    return kind


def kick_questions(
    sources: Sequence[str], *, include_path: Sequence[str] = (), limit: int | None = None
) -> KickSet:
    """Return the questions of JSON-lines files and of tasks ("task:NAME"); of none, the built-in.

    limit: at most so many questions, and documents, of each.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit needs to be 1 or more, got {limit}")
    sets = []
    for source in sources or [str(BUILT_IN)]:
        if source.startswith(TASK):
            name = source.removeprefix(TASK)
            sets.append(questions_of_tasks([name], include_path=include_path, limit=limit))
        else:
            sets.append(read_questions(source).first(limit))
    return KickSet(
        tuple(q for s in sets for q in s.questions), tuple(d for s in sets for d in s.documents)
    )


def check_card(model: str, tasks: TaskRequest | None) -> None:
    """Raise unless results of tasks can go into the card of `model`."""
    if tasks is None:
        raise ValueError("a card takes the results of --tasks: give some")
    if not Path(model).is_dir():
        raise ValueError(f"a card is written into a folder, and {model} is none: pull it first")
    Plan.from_pretrained(model)  # a compressed model
    if not is_ours(Path(model) / CARD):
        raise ValueError(
            f"{Path(model) / CARD} was not written by hf-evopress, so it is left as it is: move it "
            "away to have one made"
        )


def _text(
    model: str,
    kind: ModelClass | None,
    data: str,
    column: str,
    window: int | None,
    max_windows: int | None,
) -> tuple[Tensor, int, Sounds | None]:
    """Return the tokens (n,) of a text, the window that they are cut into, and sounds of theirs.

    Of a file of sounds a window is one of them: `window` tokens of what is said at most.
    """
    if kind is not None and kind.hears:
        made = read_sounds(model, read_config(model), [data], seq_len=window or sys.maxsize)
        tokens = made.write(min(made.n_sequences, max_windows or made.n_sequences))
        return tokens.flatten(), tokens.shape[1], made.images
    window = window_of(read_config(model), window)
    tokens = file_tokens(data, read_tokenizer(model), kind, window=window, column=column)
    return tokens, window, None


def _tasks(
    made: Any, model: str, dense: Any, against: str | None, request: TaskRequest, manager: Any
) -> dict[str, dict[str, Any]]:
    ours = run_tasks(made, tokenizer_of(model), request, manager=manager)
    theirs = {}
    if against is not None:
        theirs = run_tasks(dense, tokenizer_of(against), request, manager=manager)
    return {name: result.to_dict(theirs.get(name)) for name, result in ours.items()}
