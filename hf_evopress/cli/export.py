"""export: a compressed model for programs that do not know hf_evopress."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .console import console, error_console
from .device import computes
from .options import Out, Overwrite, TrustRemoteCode


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
            "vLLM read; exl3: trellis codes for exllamav3; gguf: a file for llama.cpp; onnx: a "
            "graph for ONNX Runtime. See hf-evopress list.",
        ),
    ],
    requantise: Annotated[
        bool,
        typer.Option(
            "--requantise",
            help="Round levels that a GGUF file cannot hold to its types, and print the KL that "
            "this adds.",
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Text to measure that KL on; default: some that the model writes itself.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a compressed model in another format, to be loaded without hf_evopress.

    \b
    hf-evopress export smol --format dense --out smol-dense
    hf-evopress compress MODEL --bits 5 --level gptq:bits=4,group_size=128,symmetric=true \\
        --level gptq:bits=8,group_size=128,symmetric=true \\
        --tie q_proj,k_proj,v_proj --tie gate_proj,up_proj --out mixed
    hf-evopress export mixed --format compressed_tensors --out mixed-vllm
    hf-evopress compress MODEL --for exl3 --bits 3.5 --out walks
    hf-evopress export walks --format exl3 --out walks-exl3
    hf-evopress export smol --format gguf --requantise --out smol-gguf
    hf-evopress export smol --format onnx --out smol-onnx
    """
    from ..jobs.convert import convert
    from ..jobs.convert import requantise as rounded
    from ..models.size import stored_bytes

    if data is not None and not requantise:
        raise ValueError("--data is what --requantise is measured on; say that as well")
    common: dict[str, Any] = {"format": format, "trust_remote_code": trust_remote_code}
    with error_console.status("writing"):
        if requantise:
            folder, report = rounded(model, out, text=data, overwrite=overwrite, **common)
            told = f"KL {report.kl_nats:.4f} nats per token ({report.n_tokens} tokens)"
            console.print(f"requantised: {told}", markup=False, soft_wrap=True)
        else:
            folder = convert(model, out, overwrite=overwrite, **common)
    console.print(f"{folder}: {stored_bytes(folder) / 1e6:.1f} MB", markup=False, soft_wrap=True)


COMMANDS = {"export": export}
