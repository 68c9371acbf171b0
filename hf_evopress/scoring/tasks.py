"""Run tasks of lm-evaluation-harness on a model that is loaded already, answer by answer.

Needs `pip install "hf-evopress[eval]"`. Tasks come from the harness or, where there is no network,
from folders of task files (`include_path`). Beside its metrics each result keeps what the model
answered to each question, so that two models can be compared by flips.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .flips import Answer, count_flips

# whether an answer is right, by the first of these metrics that a task has
CORRECT = ("acc", "exact_match", "em", "acc_norm")
LOADERS = ("json", "csv", "parquet", "text", "arrow", "pandas")  # of files, not names of data sets
BOOTSTRAP = 1000  # samples for the errors of metrics that are no means


@dataclass(frozen=True)
class TaskRequest:
    """What to run: names or patterns of tasks, and how.

    include_path: folders with task files of one's own. limit: questions of each task.
    n_shot: examples before each question, by default those of the task. chat_template: ask as a
    user would, through the tokenizer's template.
    """

    names: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    limit: int | None = None
    n_shot: int | None = None
    batch_size: int = 1
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not self.names or not all(self.names):
            raise ValueError(f"give the names of one task or more, got {list(self.names)}")
        for name in ("limit", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} needs to be 1 or more, got {value}")
        if self.n_shot is not None and self.n_shot < 0:
            raise ValueError(f"n_shot needs to be 0 or more, got {self.n_shot}")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"there is no folder {folder} with tasks (--include-path)")


@dataclass(frozen=True)
class TaskResult:
    """What one model scores on one task.

    metrics: name -> value, and errors: name -> standard error, where there is one; a metric that
    is taken after a filter of answers is called "name,filter". answers: one per question, empty
    for tasks that ask none. dataset, config, split: where the questions come from.
    """

    task: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    n_questions: int
    n_shot: int
    version: str
    dataset: str
    config: str | None
    split: str | None
    answers: tuple[Answer, ...]

    def to_dict(self, dense: TaskResult | None = None) -> dict[str, Any]:
        """Return the result as JSON values, with the dense model's and flips where it is given."""
        found: dict[str, Any] = {
            "metrics": dict(self.metrics),
            "standard_errors": dict(self.errors),
            "n_questions": self.n_questions,
            "n_shot": self.n_shot,
            "version": self.version,
            "dataset": self.dataset,
            "config": self.config,
            "split": self.split,
        }
        if dense is not None:
            found["dense_metrics"] = dict(dense.metrics)
            if self.answers and len(self.answers) == len(dense.answers):
                found["flips"] = count_flips(dense.answers, self.answers).to_dict()
        return {key: value for key, value in found.items() if value is not None}


def check_tasks(request: TaskRequest) -> Any:
    """Return the harness's task manager; LookupError names tasks that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'tasks need lm-evaluation-harness: pip install "hf-evopress[eval]"'
        ) from error
    folders = list(request.include_path)
    if folders:  # where these have all tasks, the thousands of the harness need not be read
        manager = TaskManager(include_path=folders, include_defaults=False)
        if all(manager.match_tasks([name]) for name in request.names):
            return manager
    manager = TaskManager(include_path=folders or None)
    for name in request.names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
            if os.path.exists(name):
                hint = ": give the folder that it lies in as --include-path, and its task's name"
            raise LookupError(f"lm-evaluation-harness has no task {name!r}{hint}")
    return manager


def run_tasks(
    model: Any, tokenizer: Any, request: TaskRequest, *, manager: Any = None
) -> dict[str, TaskResult]:
    """Return the results of `model`, a transformers model, by task; groups give those inside.

    manager: what `check_tasks` returned; making one anew takes seconds.
    """
    manager = manager or check_tasks(request)
    from lm_eval import simple_evaluate
    from lm_eval.models import huggingface

    logger = logging.getLogger(huggingface.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every model that is not loaded by itself
    try:
        wrapped = huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=request.batch_size
        )
    finally:
        logger.setLevel(level)
    found = simple_evaluate(
        model=wrapped,
        tasks=manager.match_tasks(list(request.names)),
        task_manager=manager,
        num_fewshot=request.n_shot,
        limit=request.limit,
        apply_chat_template=request.chat_template,
        bootstrap_iters=BOOTSTRAP,
        log_samples=True,
    )
    return {name: _result(name, found) for name in found["samples"]}


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    config = found["configs"][name]
    metrics, errors = _metrics(found["results"][name])
    samples = found["samples"][name]
    first = [s for s in samples if s.get("filter") == samples[0].get("filter")]
    dataset = str(config.get("dataset_path") or name)
    if dataset in LOADERS or os.path.exists(dataset):
        dataset = name
    split = config.get("test_split") or config.get("validation_split")
    return TaskResult(
        task=name,
        metrics=metrics,
        errors=errors,
        n_questions=len(first),
        n_shot=int(found.get("n-shot", {}).get(name) or 0),
        version=str(found.get("versions", {}).get(name)),
        dataset=dataset,
        config=config.get("dataset_name"),
        split=split,
        answers=_answers(str(config.get("output_type")), first),
    )


def _metrics(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics and their standard errors; "acc,none" is called acc."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, taken_after = key.partition(",")
        if not comma or isinstance(value, str) or value is None:
            continue  # the alias, counts, an error that is "N/A"
        into, metric = (
            (errors, metric.removesuffix("_stderr"))
            if metric.endswith("_stderr")
            else (metrics, metric)
        )
        into[metric if taken_after == "none" else f"{metric},{taken_after}"] = float(value)
    return metrics, errors


def _answers(kind: str, samples: Sequence[Mapping[str, Any]]) -> tuple[Answer, ...]:
    """Return one answer per question, in the order of questions; none for tasks that ask none."""
    if kind not in ("multiple_choice", "generate_until", "loglikelihood"):
        return ()
    judged = next((m for m in CORRECT if m in samples[0]), None)
    answers = []
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        is_correct = None if judged is None else bool(sample[judged])
        answers.append(Answer(_said(kind, sample), is_correct))
    return tuple(answers)


def _said(kind: str, sample: Mapping[str, Any]) -> str:
    said = sample["filtered_resps"]
    if kind == "generate_until":
        return str(said[0]).strip()
    if kind == "loglikelihood":
        return str(bool(said[0][1]))  # whether greedy text would have been the target
    likely = [float(choice[0]) for choice in said]
    if "acc_mutual_info" in sample:
        likely = likely[: len(likely) // 2]  # the rest is without the question
    return str(likely.index(max(likely)))
