"""Every command of the README runs on the second device, on a tiny model, in the README's order.

Sizes are scaled to the model, texts and searches are short, and what names a device is on "sim".
Commands that need an extra which is not installed are left out.
"""

from __future__ import annotations

import gc
import importlib.util
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from hf_evopress.base.devices import using
from hf_evopress.cli import app
from hf_evopress.recipes.after_search import Distil
from hf_evopress.recipes.recipe import Data
from hf_evopress.refine.block_tuning import Tuning as BlockTuning
from hf_evopress.refine.blockwise import Settings

from . import second_device
from .conftest import make_structured_text
from .export.test_gguf import N_TOKENS, by_rule
from .hub_server import Hub
from .test_readme import of

DENSE = "HuggingFaceTB/SmolLM2-135M-Instruct"
# errors along inputs alone: the second device takes its time for each of the others' small steps
LEVELS = " ".join(f"-l gptq:bits={b},group_size=64,outputs=false" for b in (2, 4))
# without them where a command is about something else
QUICK = " ".join(f"-l rtn:bits={b},group_size=64,clip=false" for b in (2, 4))
# the search for codes is slow here: two layers are enough for where its tensors lie
TRELLIS = (
    "-l trellis:bits=2,state_bits=6 --ends dense --skip 'model.layers.1.*' "
    "--skip '*.[qo]_proj' --skip '*.mlp.*'"
)
SLOW = ("--for gguf", "--tie", "--context", "--offload")  # of many small steps: one block is enough
MEGABYTES = 0.0046  # of the tiny model for one of the README's
SHORT = {
    "--seq-len": "32",
    "--calibration": "8",
    "--search-pool": "4",
    "--generations": "1",
    "--window": "32",
    "--max-windows": "2",
    "--steps": "2",
    "--batch": "1",
    "--sequences": "4",
    "--heldout": "2",
    "--limit": "1",
    "--prompt": "8",
    "--repeats": "1",
}
EXTRAS = {"--tasks": "lm_eval", "gguf": "xllamacpp", "onnx": "onnxruntime"}


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[..., nn.Module],
) -> Path:
    """A working folder with a dense model of two blocks under both of its names, and texts."""
    monkeypatch.chdir(tmp_path)
    sizes: dict[str, Any] = {"hidden_size": 128, "vocab_size": N_TOKENS, "num_hidden_layers": 2}
    for name in (DENSE, "MODEL"):
        tiny_model(**sizes, max_position_embeddings=2048).save_pretrained(tmp_path / name)
        by_rule("gpt-2").save_pretrained(tmp_path / name)
    for name in ("my.txt", "task.txt", "wiki.test.raw"):
        (tmp_path / name).write_text(make_structured_text(900, seed=len(name)))
    return tmp_path


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sequences, and some steps of refinement: where tensors lie is what counts here."""
    tuning = BlockTuning(steps=2, looks=1, attempts=1, bfloat16=True)
    settings = lambda job, mode: Settings(mode, tuning=tuning)  # noqa: E731
    monkeypatch.setattr("hf_evopress.jobs.refinement.refine_settings", settings)
    monkeypatch.setattr(Distil.__init__, "__defaults__", (2, None, False))
    names = [field.name for field in fields(Data)]
    known = dict(zip(names, Data.__init__.__defaults__, strict=True))
    monkeypatch.setattr(
        Data.__init__, "__defaults__", tuple((known | {"heldout": 1, "test": 2}).values())
    )


def adjusted(line: str) -> list[str]:
    """Return the words of a command line, made small and for the second device."""
    line = re.sub(r"\b(\d+)MB\b", lambda m: f"{float(m[1]) * MEGABYTES * 1000:.0f}KB", line)
    line = re.sub(r"--device \S+", "", line).replace("--drop-ratio 0.25", "--drop-ratio 0.5")
    line = line.replace("--family trellis", TRELLIS)
    levels = LEVELS if "--bits 3.3" in line or "gptq" in line else QUICK
    line = line.replace("--family all", levels + " -l sparsegpt:sparsity=0.5")
    line = line.replace("--width 0.75", "--width 0.5")  # 128 channels, in steps of 64
    line = line.replace("--context 8192", "--context 256 --seq-len 128")
    line = re.sub(r"--written \d+", "--written 2", line)
    if any(word in line for word in SLOW):
        line += f" --skip 'model.layers.1.*' --work one-block-{len(line)}.work"
    words = shlex.split(line)
    known = _options(words[0])
    by_mode = {"best": "--steps", "end-to-end": "--search-pool"}
    refused = {option for mode, option in by_mode.items() if mode in words}
    for name, value in SHORT.items():
        if name in known and name not in words and name not in refused:
            words += [name, value]
    if words[0] == "compress":
        words += [] if "--data" in words else ["--data", "my.txt"]
    if words[0] in ("compress", "levels", "search"):
        has_levels = {"-l", "--level", "--sparsity", "--drop-ratio", "--for"} & set(words)
        words += [] if has_levels else shlex.split(levels)
    words += ["--overwrite"] if "--overwrite" in known else []
    return words + (["--device", "sim"] if "--device" in known else [])


def _options(command: str) -> set[str]:
    group: Any = get_command(app)
    assert isinstance(group, TyperGroup)
    return {name for p in group.commands[command].params for name in p.opts}


def lines() -> list[str]:
    """The README's commands but those whose extra is not installed."""
    found = [line.removeprefix("hf-evopress ") for line in of("hf-evopress")]
    absent = [w for w, package in EXTRAS.items() if importlib.util.find_spec(package) is None]
    return [line for line in found if not any(word in line for word in absent)]


@pytest.mark.slow
def test_every_command_runs_there(hub: Hub, place: Path, few_steps: None) -> None:
    run = CliRunner()
    with using("sim"):
        for extra in (
            f"compress {DENSE} --size 90MB --data my.txt --out demo/smol-90MB",
            "compress MODEL --size 120MB --ends dense -l rtn:bits=4,group_size=32 --data my.txt "
            "--out other",
        ):
            done = run.invoke(app, adjusted(extra))
            assert done.exit_code == 0, (extra, done.output, done.exception)
    second_device.reset_peak()
    gc.collect()
    gc.freeze()  # what is there need not be gone through after each command
    for line in lines():
        start = time.perf_counter()
        before = second_device.live_bytes()
        done = run.invoke(app, adjusted(line))
        assert done.exit_code == 0, (line, done.output[-3000:], done.exception)
        print(f"{time.perf_counter() - start:.1f} s: {line}")
        gc.collect()
        assert second_device.live_bytes() < before + 8192, line  # tables that are kept
    assert second_device.peak_bytes() > 0
