"""bench: how fast a compressed model is, against the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import bars, console, table
from .device import computes
from .options import TrustRemoteCode

if TYPE_CHECKING:
    from ..jobs.bench import Bench, Speed


@computes
def bench(
    model: Annotated[str, typer.Argument(help="A compressed model.")],
    against: Annotated[str | None, typer.Option(help="The dense model.")] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="auto, packed, expanded, int4 or triton. Repeat.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences at once; default 1, 4 and 16. Repeat.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is read.")] = 512,
    repeats: Annotated[int, typer.Option(help="Each figure is the best of so many.")] = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    png: Annotated[
        Path | None, typer.Option("--plot", help="Draw tokens per second (.png, .svg).")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure loading, memory, prompts and generation, by turns in one process.

    \b
    hf-evopress bench smol-3.3bit --against HuggingFaceTB/SmolLM2-135M-Instruct --plot speed.png
    """
    from ..jobs.bench import bench as measure

    if dtype not in ("bfloat16", "float32", "float16"):
        raise ValueError(f"dtype is bfloat16, float32 or float16, got {dtype!r}")
    if png is not None:
        from ..sharing.plots import check_picture

        check_picture(png)
    batches = tuple(batch or (1, 4, 16))
    with bars() as progress:
        found = measure(
            model,
            against=against,
            runtimes=tuple(runtime or ("auto",)),
            batches=batches,
            prompt=prompt,
            repeats=repeats,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    console.print(f"{found.machine}, {dtype}; memory reads {found.bandwidth / 1e9:.1f} GB/s")
    console.print(_table(found, batches, found.speeds[0] if against else None))
    if png is not None:
        from ..sharing.plots import speed_plot

        series = {one.name: one.decode for one in found.speeds}
        console.print(f"speeds drawn to {speed_plot(series, png)}", markup=False)


def _table(found: Bench, batches: Sequence[int], dense: Speed | None) -> Table:
    headers: tuple[str, ...] = ("", "load s", "MB held", "MB to load", "MB for a prompt")
    headers += (f"prompt of {found.prompt}, tokens/s",)
    rows = []
    for one in found.speeds:
        cells = [one.name, f"{one.load_seconds:.1f}"]
        cells += [_megabytes(n) for n in (one.held_bytes, one.peak_bytes, one.prompt_bytes)]
        cells.append(_ratio(one.prefill, dense.prefill if dense else None))
        cells += [_ratio(one.decode[b], dense.decode[b] if dense else None) for b in batches]
        share = one.decode[batches[0]] / batches[0] * one.read_bytes
        cells.append(f"{share / 1e9:.1f}")
        rows.append(cells)
    headers += tuple(f"batch {b}, tokens/s" for b in batches)
    return table((*headers, f"GB/s at {batches[0]}"), rows)


def _megabytes(n: int | None) -> str:
    return "" if n is None else f"{n / 1e6:.0f}"


def _ratio(value: float, dense: float | None) -> str:
    return f"{value:.1f}" + ("" if dense is None else f" ({value / dense:.2f}x)")


COMMANDS = {"bench": bench}
