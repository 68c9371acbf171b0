"""adapt, tune, merge: commands that repair and train a compressed model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bars, console, error_console, table
from .device import computes
from .options import Column, Overwrite, TrustRemoteCode

if TYPE_CHECKING:
    from ..adapters.repair import Merged
    from ..training.tune import Tuned

Model = Annotated[str, typer.Argument(help="A compressed model: a folder or a Hub name.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder to write.")]
Texts = Annotated[
    list[str],
    typer.Option(
        "--data",
        "-d",
        help="Text of the task: a file (.txt, .json, .jsonl, .parquet) or a Hub dataset "
        "name[:config]. Repeat for more.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of data order and first adapter weights.")]
Train = Annotated[
    str,
    typer.Option(
        help="lora, rslora or dora: an adapter. Any of codes,scales,factors,norms,biases: the "
        "model itself; its plan and size stay. codes: those of rtn, gptq and trellis levels, by "
        "PV-Tuning."
    ),
]
Target = Annotated[
    str, typer.Option(help="all-linear, kappa:0.2 (forgets least), or names as q_proj,v_proj.")
]
Start = Annotated[
    str | None, typer.Option(help="Train this adapter further, such as one of `adapt`.")
]
Beside = Annotated[str | None, typer.Option(help="Keep this adapter active and frozen meanwhile.")]
Teacher = Annotated[
    str | None,
    typer.Option(help="The dense model (NAME@COMMIT: of a commit): learn from it, to heal."),
]
Every = Annotated[int, typer.Option(help="Training steps between two changes of codes.")]
MaxChange = Annotated[
    float, typer.Option(help="Share of a layer's codes (trellis: tiles) that one of them changes.")
]
Trust = Annotated[
    float, typer.Option(help="Most that one changes what a layer computes, relative to it.")
]
Checkpointing = Annotated[bool, typer.Option(help="Less memory, a third more time.")]


@computes
def adapt(
    model: Model,
    out: Out,
    data: Texts,
    column: Column = "text",
    rank: Annotated[int | None, typer.Option(help="The same rank for every layer.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Bytes of the adapter, such as 8MB: ranks are chosen to fit it best."),
    ] = None,
    error: Annotated[
        float | None, typer.Option(help="Share of its output each layer may get wrong, as 0.01.")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model; default: the one the plan names.")
    ] = None,
    prefix: Annotated[
        bool, typer.Option(help="Make up for the errors of earlier layers as well.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the factors: bfloat16 or float16.")] = "bfloat16",
    calibration: Annotated[int, typer.Option(help="Sequences of text.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Compute an EoRA adapter: each layer's compression error, added back at low rank.

    \b
    hf-evopress adapt smol-3.3bit --rank 32 --data task.txt --out smol-3.3bit-eora

    The result is an ordinary PEFT LoRA adapter; no training, one pass over the text. MODEL may
    be of another quantizer, with --dense: bitsandbytes, GPTQ, AWQ, compressed-tensors, torchao,
    FP8, or the path of a GGUF file. HQQ is refused, as transformers cannot load it.
    """
    from ..adapters.repair import adapt as run

    with bars() as progress:
        folder = run(
            model,
            out,
            data=data,
            column=column,
            dense=dense,
            rank=rank,
            size=size,
            error=error,
            prefix=prefix,
            dtype=dtype,
            n_sequences=calibration,
            seq_len=seq_len,
            seed=seed,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    _show_adapter(folder)


@computes
def tune(
    model: Model,
    out: Out,
    data: Texts,
    column: Column = "text",
    train: Train = "lora",
    target: Target = "all-linear",
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    start: Start = None,
    beside: Beside = None,
    teacher: Teacher = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences to train on.")] = 256,
    written: Annotated[
        int, typer.Option(help="Sequences that the teacher writes itself, to learn from as well.")
    ] = 0,
    every: Every = 8,
    max_change: MaxChange = 0.01,
    trust: Trust = 0.02,
    test: Annotated[
        list[str] | None, typer.Option(help="Text file: perplexity before and after. Repeat.")
    ] = None,
    gradient_checkpointing: Checkpointing = False,
    bf16: Annotated[bool, typer.Option(help="Compute in bfloat16.")] = False,
    targets: Annotated[
        str | None,
        typer.Option(help="Folder for the teacher's predictions, for other runs to use as well."),
    ] = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a compressed model on a text, or let it learn from its dense model.

    \b
    hf-evopress tune smol-3.3bit --data task.txt --target kappa:0.2 --out smol-task
    hf-evopress tune smol-2.8bit --data text.txt --train scales,norms \\
        --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out smol-2.8bit-healed

    An adapter can be trained over models of other quantizers, too, as far as PEFT knows them.
    Stopped runs go on from their last checkpoint, in OUT.work.
    """
    words = dict(locals())
    from ..training.settings import Tuning
    from ..training.tune import tune as run

    settings = Tuning(**{k: words[k] for k in Tuning.__dataclass_fields__ if k in words})
    common: dict[str, Any] = {"data": data, "targets": targets, "overwrite": overwrite}
    common["trust_remote_code"] = trust_remote_code
    with bars() as progress:
        tests = {path: path for path in test or ()}
        result = run(model, out, settings, tests=tests, **common, progress=progress)
    _show_tuned(result)


@computes
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter of that model.")],
    out: Out,
    exact: Annotated[
        bool, typer.Option(help="As low-rank terms of the levels: no loss, more bytes.")
    ] = False,
    data: Annotated[
        list[str] | None, typer.Option("--data", "-d", help="Text to calibrate on. Repeat.")
    ] = None,
    column: Column = "text",
    work: Annotated[
        str | None, typer.Option(help="Statistics of an earlier run, instead of text.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model, to measure against.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Text file to measure on.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window of the figures. Default: 512.")
    ] = None,
    calibration: Annotated[int, typer.Option(help="Calibration sequences.")] = 56,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Fold an adapter into the packed model, and measure what that costs.

    \b
    hf-evopress merge smol-3.3bit smol-task --data task.txt --out smol-task-3.3bit
    """
    from ..adapters.repair import merge as run

    with bars() as progress:
        result = run(
            model,
            adapter,
            out,
            exact=exact,
            data=data or (),
            column=column,
            work=work,
            against=against,
            test=test,
            window=window,
            n_sequences=calibration,
            seq_len=seq_len,
            seed=seed,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=progress,
        )
    _show_merged(result, against, exact=exact)


def show_follow_up(made: dict[str, Any]) -> None:
    """Print what a recipe did after its model was made."""
    if "adapter" in made:
        _show_adapter(made["adapter"])
    if "tune" in made:
        _show_tuned(made["tune"])


def _show_adapter(folder: Path) -> None:
    from ..adapters.folder import read_adapter
    from ..base.resources import format_size

    adapter = read_adapter(folder)
    ranks = sorted(adapter.ranks.values())
    console.print(
        f"adapter written to {folder}: {len(ranks)} layers, ranks {ranks[0]} to {ranks[-1]}, "
        f"{format_size(adapter.size_bytes)}",
        markup=False,
        soft_wrap=True,
    )


def _show_tuned(result: Tuned) -> None:
    if result.losses:
        console.print(
            f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {len(result.losses)} "
            f"steps, {result.n_trained:,} parameters trained"
        )
    if result.kl is not None:
        end = "" if result.is_kept else ": not lower, so the model is as it was"
        console.print(
            f"KL from the teacher on held-out text {result.kl[0]:.4f} -> {result.kl[1]:.4f}{end}"
        )
    if result.perplexity:
        rows = [(name, f"{a:.2f}", f"{b:.2f}") for name, (a, b) in result.perplexity.items()]
        console.print(table(("perplexity", "before", "after"), rows))
    console.print(f"written to {result.folder}", markup=False)


def _show_merged(result: Merged, against: str | None, *, exact: bool) -> None:
    if result.reports:
        of = f"from {against}" if against else "from the model with its adapter"
        rows = [
            (name, f"{report.kl_nats or 0:.4f}", f"{report.perplexity:.2f}")
            for name, report in result.reports.items()
        ]
        console.print(table((f"KL (nats) {of}", "KL", "perplexity"), rows))
        kl = {name: report.kl_nats or 0.0 for name, report in result.reports.items()}
        gained = "with adapter" in kl and kl["with adapter"] < kl["without adapter"]
        if gained and kl["merged"] > kl["without adapter"] and not exact:
            error_console.print(
                "rounding lost more than the adapter had gained: use the adapter beside the model, "
                "or make its factors part of the checkpoint (merge --exact)"
            )
    console.print(f"model written to {result.folder}", markup=False)


COMMANDS = {"adapt": adapt, "tune": tune, "merge": merge}
