"""Results of evaluation tasks beside a model: a file, the Hub's `model-index`, a table.

    evopress_tasks.json     task -> metrics, standard errors, the dense model's, flips

A later evaluation adds its tasks and replaces those that it ran again. Cards show the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.reading import read_object
from ..base.resources import atomic_write
from ..plans.card_template import cell

FILE = "evopress_tasks.json"
HARNESS = "lm-evaluation-harness"
HARNESS_URL = "https://github.com/EleutherAI/lm-evaluation-harness"
NAMES = {"acc": "accuracy", "acc_norm": "normalized accuracy", "exact_match": "exact match"}
HEADERS = ["task", "questions", "metric", "this model", "dense", "answers changed"]
HEADERS += ["right to wrong", "wrong to right"]
MAX_TASKS = 1000


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return task -> result of a folder, sorted; empty where nothing was evaluated."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    tasks = read_object(path).get("tasks")
    if not isinstance(tasks, dict) or len(tasks) > MAX_TASKS:
        raise ValueError(f"{path} has no object 'tasks' of at most {MAX_TASKS} tasks")
    for name, result in tasks.items():
        if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
            raise ValueError(f"{path}: task {name!r} has no object 'metrics'")
    return {name: tasks[name] for name in sorted(tasks)}


def add_results(folder: str | Path, results: Mapping[str, Mapping[str, Any]]) -> Path:
    """Return the file of a folder, with `results` added to the tasks that are in it."""
    tasks = {**read_results(folder), **results}
    text = json.dumps({"tasks": dict(sorted(tasks.items()))}, indent=2, allow_nan=False)
    return atomic_write(Path(folder) / FILE, text + "\n")


def model_index(
    name: str, task: str | None, results: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]] | None:
    """Return the `model-index` of a card's metadata as the Hub reads it; None without results.

    task: what the model does, in the Hub's words, such as text-generation.
    """
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    rows = [
        EvalResult(
            task_type=task or "text-generation",
            dataset_type=_text(result.get("dataset")) or name_of_task,
            dataset_name=name_of_task,
            dataset_config=_text(result.get("config")),
            dataset_split=_text(result.get("split")),
            dataset_args=_shots(result.get("n_shot")),
            metric_type=metric.partition(",")[0],
            metric_name=metric_name(metric),
            metric_value=round(float(value), 6),
            source_name=HARNESS,
            source_url=HARNESS_URL,
        )
        for name_of_task, result in results.items()
        for metric, value in result["metrics"].items()
        if _is_number(value)
    ]
    return eval_results_to_model_index(name, rows) if rows else None


def table_rows(
    results: Mapping[str, Mapping[str, Any]], *, is_markdown: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells of a table, one row per metric; columns that are not known go.

    Flips are of a task's answers, so they stand in the row of its first metric.
    """
    rows = []
    for task, result in results.items():
        said = result.get("flips")
        flips: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        dense = result.get("dense_metrics")
        errors = result.get("standard_errors")
        for metric, value in result["metrics"].items():
            if not _is_number(value):
                continue
            error = errors.get(metric) if isinstance(errors, Mapping) else None
            row = [task, _count(result.get("n_questions")), metric_name(metric)]
            row.append(f"{value:.4f}" + (f" ± {error:.4f}" if _is_number(error) else ""))
            row.append(_number(dense.get(metric) if isinstance(dense, Mapping) else None, ".4f"))
            row += [_number(flips.get(k), ".1%") for k in _FLIPS]
            rows.append([cell(text) for text in row] if is_markdown else row)
            flips = {}
    used = [i for i in range(len(HEADERS)) if i < 4 or any(row[i] for row in rows)]
    return [HEADERS[i] for i in used], [[row[i] for i in used] for row in rows]


_FLIPS = ("changed", "correct_to_wrong", "wrong_to_correct")


def metric_name(metric: str) -> str:
    """Return a metric's name for people: metric_name("acc_norm") == "normalized accuracy"."""
    metric, _, taken_after = metric.partition(",")
    name = NAMES.get(metric, metric.replace("_", " "))
    return f"{name} ({taken_after})" if taken_after else name


def _shots(value: Any) -> dict[str, Any] | None:
    return {"num_few_shot": value} if _is_number(value) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _number(value: Any, form: str) -> str:
    return format(value, form) if _is_number(value) else ""


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
