"""export: a compressed model for programs that do not know hf_evopress."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import console, error_console
from .device import computes
from .options import Out, Overwrite


@computes
def export(
    model: Annotated[str, typer.Argument(help="A compressed model: a folder or a Hub name.")],
    out: Out,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="dense: a stock checkpoint, no smaller; pruned: the same without the blocks that "
            "are dropped whole; compressed_tensors: packed codes that stock transformers and "
            "vLLM read. See hf-evopress list.",
        ),
    ],
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model in another format, to be loaded without hf_evopress.

    \b
    hf-evopress export smol --format dense --out smol-dense
    hf-evopress compress MODEL --bits 5 --level gptq:bits=4,group_size=128,symmetric=true \\
        --level gptq:bits=8,group_size=128,symmetric=true \\
        --tie q_proj,k_proj,v_proj --tie gate_proj,up_proj --out mixed
    hf-evopress export mixed --format compressed_tensors --out mixed-vllm
    """
    from ..jobs.convert import convert
    from ..models.size import stored_bytes

    with error_console.status("writing"):
        folder = convert(model, out, format=format, overwrite=overwrite)
    size = f"{stored_bytes(folder) / 1e6:.1f} MB"
    console.print(f"{folder}: {size}", markup=False, soft_wrap=True)


COMMANDS = {"export": export}
