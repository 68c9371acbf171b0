"""apply: a model compressed by a plan that is already there."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import console
from .device import computes
from .options import (
    Calibration,
    Column,
    Out,
    Overwrite,
    Revision,
    Seed,
    SeqLen,
    Texts,
    TrustRemoteCode,
)


@computes
def apply(
    plan: Annotated[str, typer.Argument(help="A plan: a file, a folder or a Hub name.")],
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="The dense model; default: the one the plan was made for.")
    ] = None,
    data: Texts = None,
    column: Column = "text",
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Compress a model by a plan that is already there, without a search.

    \b
    hf-evopress apply plan.json --model me/my-finetune --data text.txt --out my-finetune-3.3bit
    """
    from ..jobs.apply import apply_plan

    folder = apply_plan(
        plan,
        out,
        model=model,
        data=data,
        column=column,
        n_sequences=calibration,
        seq_len=seq_len,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    console.print(f"model written to {folder}", markup=False)


COMMANDS = {"apply": apply}
