"""evaluate: what a model scores on texts and tasks, and what it still knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from .console import bars, console, table
from .device import computes
from .options import Column, TrustRemoteCode, Window

Text = Annotated[str | None, typer.Option("--data", "-d", help="A text file or a table.")]
Against = Annotated[
    str | None,
    typer.Option(
        help="The dense model (NAME@COMMIT: of a commit): adds KL divergence, agreement, flips."
    ),
]
MaxWindows = Annotated[int | None, typer.Option(help="Stop after so many windows.", min=1)]
Tasks = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness, with commas between; * matches."),
]
Folders = Annotated[
    list[str] | None,
    typer.Option("--include-path", help="Folder with task files of your own. Repeat."),
]
Limit = Annotated[int | None, typer.Option(help="Questions of each task or file.", min=1)]
Shots = Annotated[
    int | None, typer.Option("--fewshot", help="Examples before each question of a task.")
]
Batch = Annotated[int, typer.Option("--batch", help="Requests of a task at once.", min=1)]
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
        text = json.dumps(_without_infinity(found), indent=2, allow_nan=False)
        console.print(text, markup=False, soft_wrap=True)
    else:
        _show(model, found)


def _without_infinity(value: Any) -> Any:
    """Return JSON values with null for the infinite perplexity of a collapsed model."""
    if isinstance(value, Mapping):
        return {key: _without_infinity(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        rows = [(name, _told(row)) for name, row in found["kick"].items()]
        console.print(table(("probe", "found"), rows))


def _told(row: Mapping[str, Any]) -> str:
    """Return the figures of a probe in a sentence."""
    key = next(key for key in ("n_questions", "n_documents", "n_tokens") if key in row)
    asked = f"{row[key]} {key[2:-1]}{'s' if row[key] != 1 else ''}"
    told = []
    if "accuracy" in row:
        told.append(f"{_share(row['accuracy'], row['accuracy_standard_error'])} right")
    if "dense_accuracy" in row:
        apart = _share(row["difference"], row["difference_standard_error"], sign="+")
        told.append(f"dense {_share(row['dense_accuracy'])}, difference {apart}")
    if "gain" in row:
        dense = f" (dense {_share(row['dense_gain'], sign='+')})" if "dense_gain" in row else ""
        told.append(f"{_share(row['gain'], sign='+')} by reading{dense}")
    if "changed" in row:
        told.append(f"{_share(row['changed'])} of answers changed")
    if "correct_to_wrong" in row:
        told.append(f"{_share(row['correct_to_wrong'])} right to wrong")
        told.append(f"{_share(row['wrong_to_correct'])} wrong to right")
    if "kl_nats" in row:
        told.append(f"KL {row['kl_nats']:.4f} nats")
    if "top1_agreement" in row:
        told.append(f"same top-1 {_share(row['top1_agreement'])}")
    if "rouge_l" in row:
        told.append(f"ROUGE-L {row['rouge_l']:.4f}")
    return f"of {asked}: {'; '.join(told)}"


def _share(value: float, error: float | None = None, *, sign: str = "") -> str:
    behind = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * value:{sign}.1f}{behind} %"


COMMANDS = {"evaluate": evaluate}
