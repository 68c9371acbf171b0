"""stack, resize: one checkpoint of many sizes, and the sizes of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import bars, console
from .device import computes
from .options import (
    Calibration,
    Column,
    Model,
    Out,
    Overwrite,
    Revision,
    Seed,
    SeqLen,
    Texts,
    TrustRemoteCode,
    Work,
)


@computes
def stack(
    model: Model,
    out: Out,
    blocks: Annotated[
        int, typer.Option(help="Blocks of each layer at the largest size; about a bit per weight.")
    ] = 6,
    rank: Annotated[int, typer.Option(help="Rank of the sizes of a block.")] = 1,
    ends: Annotated[
        str, typer.Option(help="Level of embedding and head, which all sizes have, or dense.")
    ] = "rtn:bits=6,group_size=64",
    data: Texts = None,
    column: Column = "text",
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    revision: Revision = None,
    work: Work = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Compress a model to many sizes at once: any prefix of its blocks is a model.

    \b
    hf-evopress stack HuggingFaceTB/SmolLM2-135M-Instruct --data text.txt --out smol-sizes
    hf-evopress resize smol-sizes --size 60MB --out smol-60mb
    """
    from ..base.resources import format_size
    from ..jobs.stack import menu, sizes_of
    from ..jobs.stack import stack as stacked
    from ..recipes.recipe import Recipe

    words: dict[str, Any] = {
        "model": model,
        "out": out,
        "work": work,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "budget": {"ratio": 1.0},  # nobody's limit
        "levels": menu(blocks, rank),
        "ends": ends,
        "data": {
            "sources": list(data or ()),
            "column": column,
            "seq_len": seq_len,
            "calibration": calibration,
            "seed": seed,
        },
    }
    recipe = Recipe.from_dict({k: v for k, v in words.items() if v is not None})
    with bars() as progress:
        folder, _ = stacked(recipe, overwrite=overwrite, progress=progress)
    least, most = (format_size(n) for n in sizes_of(folder))
    console.print(f"model of every size from {least} to {most} written to {folder}", markup=False)


def resize(
    model: Annotated[str, typer.Argument(help="A model of many sizes: a folder or a Hub name.")],
    out: Out,
    size: Annotated[str, typer.Option(help="Bytes that the file may have, such as 60MB.")],
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Take the blocks that fit into a size; of a model on the Hub no more is downloaded.

    \b
    hf-evopress resize me/smol-sizes --size 60MB --out smol-60mb
    """
    from ..jobs.stack import resize_checkpoint

    folder = resize_checkpoint(model, out, size=size, revision=revision, overwrite=overwrite)
    console.print(f"model written to {folder}", markup=False)


COMMANDS = {"stack": stack, "resize": resize}
