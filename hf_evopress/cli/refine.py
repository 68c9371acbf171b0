"""refine: improve the codes of an existing plan or model, at no extra byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from ..base.plugins import did_you_mean
from ..recipes.recipe import END_TO_END, REFINE
from .console import bars
from .device import computes
from .options import (
    Calibration,
    Column,
    Out,
    Overwrite,
    Revision,
    SearchPool,
    Seed,
    SeqLen,
    Test,
    Texts,
    TrustRemoteCode,
    Window,
    Work,
    Written,
)
from .results import show_result

Steps = Annotated[
    int | None, typer.Option(help="Training steps of end-to-end; default: 200.", min=1)
]
LearningRate = Annotated[float | None, typer.Option(help="Of end-to-end; default: 1e-4.", min=0)]

Codes = Annotated[
    bool,
    typer.Option(
        "--codes",
        help="In end-to-end codes and walks move as well (PV-Tuning); kept only if held-out text "
        "says so.",
    ),
]

Mode = Annotated[
    str,
    typer.Option(
        help="fast: levels made anew on what the compressed layers before them produce; "
        "best: codes and scales of each block tuned by gradients as well; end-to-end: scales, "
        "factors and norms of a compressed model learn from the dense one; best+end-to-end, the "
        "closest, or fast+end-to-end: one after the other."
    ),
]

MODES = REFINE[1:]


@computes
def refine(
    plan: Annotated[str, typer.Argument(help="A plan or a compressed model: file, folder, Hub.")],
    out: Out,
    mode: Mode = "best",
    model: Annotated[
        str | None, typer.Option(help="The dense model; default: the one the plan was made for.")
    ] = None,
    data: Texts = None,
    column: Column = "text",
    test: Test = None,
    work: Work = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    written: Written = 0,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    codes: Codes = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    window: Window = None,
) -> None:
    """Finish a plan: tune its levels block by block against the dense model; bytes stay.

    \b
    hf-evopress refine plan.json --data text.txt --out smol-3.3bit-refined
    hf-evopress refine smol-3.3bit --mode fast --data text.txt --out smol-3.3bit-refined
    hf-evopress refine smol-3.3bit --mode end-to-end --data text.txt --out smol-3.3bit-distilled
    hf-evopress refine smol-3.3bit --mode best+end-to-end --data text.txt --out smol-3.3bit-best

    `compress --refine best` does the same at the end of a search, from the search's own levels.
    Stop it with Ctrl-C at any time; the same command goes on at the next block, or from the last
    checkpoint in OUT.work.
    """
    from ..jobs.refine_existing_model import refine_end_to_end
    from ..jobs.refine_existing_plan import refine_plan

    training = {"--steps": steps, "--learning-rate": learning_rate, "--codes": codes or None}
    if mode == END_TO_END:
        pool = None if search_pool == 32 else search_pool
        _check(mode, {"--work": work, "--revision": revision, "--search-pool": pool})
    else:
        _check(mode, {} if mode.endswith(END_TO_END) else training)
    common: dict[str, Any] = {
        **{"data": data or (), "column": column, "test": test, "window": window, "seed": seed},
        **{"seq_len": seq_len, "n_sequences": calibration, "written": written},
        **{"overwrite": overwrite, "trust_remote_code": trust_remote_code},
    }
    given = {"steps": steps, "learning_rate": learning_rate, "codes": codes}
    common |= {key: value for key, value in given.items() if value is not None}
    with bars() as progress:
        common["progress"] = progress
        if mode == END_TO_END:
            result = refine_end_to_end(plan, out, dense=model, **common)
        else:
            common |= {"model": model, "work": work, "revision": revision}
            result = refine_plan(plan, out, mode=mode, search_pool=search_pool, **common)
    show_result(result)


def _check(mode: str, given: Mapping[str, object]) -> None:
    """Raise an error for an unknown mode, and one that names options it would pass over."""
    if mode not in MODES:
        raise typer.BadParameter(f"no mode {mode!r}{did_you_mean(mode, list(MODES))}")
    if named := [option for option, value in given.items() if value is not None]:
        raise typer.BadParameter(f"mode {mode} takes no {' and no '.join(named)}: leave it out")


COMMANDS = {"refine": refine}
