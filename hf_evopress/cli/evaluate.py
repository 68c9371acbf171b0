"""evaluate: what a model scores on texts and tasks, and what it still knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .console import bars, console, table
from .device import computes
from .options import Column, TrustRemoteCode, Window

COLUMNS = {  # of the table of probes
    "n_questions": "questions",
    "n_documents": "documents",
    "n_tokens": "tokens",
    "accuracy": "right",
    "dense_accuracy": "dense",
    "difference": "difference",
    "gain": "gain by reading",
    "dense_gain": "dense",
    "changed": "answers changed",
    "correct_to_wrong": "right to wrong",
    "wrong_to_correct": "wrong to right",
    "kl_nats": "KL (nats)",
    "top1_agreement": "same top-1",
    "rouge_l": "ROUGE-L",
}
ERRORS = {  # the standard errors that are shown behind figures
    "accuracy": "accuracy_standard_error",
    "difference": "difference_standard_error",
}

Text = Annotated[str | None, typer.Option("--data", "-d", help="A text file or a table.")]
Against = Annotated[
    str | None, typer.Option(help="The dense model: adds KL divergence, agreement and flips.")
]
MaxWindows = Annotated[int | None, typer.Option(help="Stop after so many windows.")]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness, with commas between; * matches."),
]
Folders = Annotated[
    list[str] | None,
    typer.Option("--include-path", help="Folder with task files of your own. Repeat."),
]
Limit = Annotated[int | None, typer.Option(help="Questions of each task or file.")]
Shots = Annotated[
    int | None, typer.Option("--fewshot", help="Examples before each question of a task.")
]
Batch = Annotated[int, typer.Option("--batch", help="Requests of a task at once.")]
Chat = Annotated[
    bool, typer.Option("--chat-template", help="Ask tasks under the model's chat template.")
]
Card = Annotated[
    bool, typer.Option("--card", help="Put the results of tasks into the model's card.")
]
Kick = Annotated[
    bool, typer.Option("--kick", help="Probe what it still knows and does (LLM-KICK).")
]
KickData = Annotated[
    list[str] | None,
    typer.Option(
        help="Questions for --kick instead of the built-in ones: a JSON-lines file, or task:NAME "
        "of lm-evaluation-harness. Repeat."
    ),
]


@computes
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, dense or compressed.")],
    data: Text = None,
    column: Column = "text",
    against: Against = None,
    window: Window = None,
    max_windows: MaxWindows = None,
    tasks: Tasks = None,
    folders: Folders = None,
    limit: Limit = None,
    n_shot: Shots = None,
    batch_size: Batch = 1,
    chat_template: Chat = False,
    card: Card = False,
    kick: Kick = False,
    kick_data: KickData = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "float32",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity, tasks and knowledge; with --against, what changed from the dense model.

    \b
    hf-evopress evaluate smol-3.3bit --against HuggingFaceTB/SmolLM2-135M-Instruct --data wiki.txt
    hf-evopress evaluate smol-3.3bit --against ... --tasks arc_easy,piqa --limit 200 --card
    hf-evopress evaluate smol-3.3bit --against ... --kick
    """
    from ..jobs.evaluate import evaluate_model, kick_questions

    asked: dict[str, Any] = {"limit": limit, "n_shot": n_shot, "batch_size": batch_size}
    asked |= {"include_path": tuple(folders or ()), "chat_template": chat_template}
    questions = None
    if kick or kick_data:
        questions = kick_questions(kick_data or (), include_path=folders or (), limit=limit)
    with bars() as progress:
        found = evaluate_model(
            model,
            data,
            column=column,
            against=against,
            window=window,
            max_windows=max_windows,
            tasks=_request(tasks, asked),
            questions=questions,
            card=card,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.print(json.dumps(found, indent=2), markup=False, soft_wrap=True)
    else:
        _show(model, found)


def _request(names: str | None, asked: Mapping[str, Any]) -> Any:
    if names is None:
        return None
    from ..scoring.tasks import TaskRequest

    return TaskRequest(tuple(name.strip() for name in names.split(",")), **asked)


def _show(model: str, found: Mapping[str, Any]) -> None:
    rows = [
        (key, f"{value:.5g}" if isinstance(value, float) else f"{value:,}")
        for key, value in found.items()
        if isinstance(value, (int, float))
    ]
    if rows:
        console.print(table(("", model), rows))
    if "tasks" in found:
        from ..sharing.task_results import table_rows

        headers, cells = table_rows(found["tasks"], is_markdown=False)
        console.print(table(headers, cells))
    if "kick" in found:
        used = [key for key in COLUMNS if any(key in row for row in found["kick"].values())]
        cells = [
            [name, *(_cell(key, row.get(key), row.get(ERRORS.get(key, ""))) for key in used)]
            for name, row in found["kick"].items()
        ]
        console.print(table(["probe", *(COLUMNS[key] for key in used)], cells))


def _cell(key: str, value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if error is not None:
        return f"{value:.1%} ± {100 * error:.1f}"
    return f"{value:.4f}" if key in ("kl_nats", "rouge_l") else f"{value:.1%}"


COMMANDS = {"evaluate": evaluate}
