"""Convert a compressed model to another format, for programs without hf_evopress."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.by_name import is_gguf, load, plan_of, tokenizer_of
from ..base.devices import on_device
from ..base.own_code import is_trusted, trusts_code
from ..base.plugins import load as load_plugin
from ..base.target import writes_out
from ..calibration.data import tokenize_file
from ..calibration.own_text import write_self
from ..calibration.text import RAW
from ..loading.replace import blank_linears
from ..methods.base import State
from ..models.causal_only import check_causal
from ..models.classes import ModelClass, takes_images
from ..models.plain import match_plan
from ..models.source import kind_of, read_config
from ..plans.level import Level
from ..scoring.evaluate import Report, compare_many

WINDOW, MAX_WINDOWS, N_WRITTEN = 256, 16, 4  # what the price of rounding is measured on


@trusts_code
@on_device
@writes_out("model")
def convert(model: str, out: str | Path, *, format: str, overwrite: bool = False) -> Path:
    """Return `out` with the compressed `model`, a folder or Hub name, in an export format.

    format: a name in `hf-evopress list`, such as dense or compressed_tensors. Everything that was
    trained comes along; units that the format has no place for raise ValueError by name.
    """
    return _converted(model, out, load_plugin("export", format)())[0]


@trusts_code
@on_device
@writes_out("model", "text")
def requantise(
    model: str, out: str | Path, *, format: str, text: str | None = None, overwrite: bool = False
) -> tuple[Path, Report]:
    """Return as `convert` does, after rounding what the format has no place for, and what it cost.

    The report is of the rounded model against `model`, on a text file or, without one, on
    sequences that `model` writes itself.
    """
    exporter = load_plugin("export", format)()
    if not exporter.can_requantise:
        raise ValueError(f"{format} rounds nothing; only gguf takes --requantise")
    exporter.requantise = True
    tokens = None if text is None else tokenize_file(text, tokenizer_of(model))
    folder, after = _converted(model, out, exporter)
    before = load(model)
    if tokens is None:
        tokens = _written(before, tokenizer_of(model))
    window = min(WINDOW, len(tokens))
    reports = compare_many(
        {"after": after.to(before.dtype)}, before, tokens, window=window, max_windows=MAX_WINDOWS
    )
    return folder, reports["after"]


def _converted(model: str, out: str | Path, exporter: Any) -> tuple[Path, Any]:
    """Return `out`, written, and the dense model of what was written."""
    kind = _kind(model, exporter)
    packed = load(model, dtype="auto", kind=kind)
    plan = plan_of(packed)
    if plan is None:
        raise ValueError(f"{model} is not a compressed model of hf_evopress: it has no plan")
    held = blank_linears(
        packed
    )  # the exporter fills them, once, and adds what levels add to biases

    def states(unit: str, level: Level) -> State:
        return dict(held[unit].state)

    stock: Any = packed.dequantize()
    match_plan(stock, plan)
    code: dict[str, Any] = {"source": model, "with_code": True} if is_trusted() else {}
    return exporter.save(stock, plan, states, out, tokenizer=tokenizer_of(model), **code), stock


def _kind(model: str, exporter: Any) -> ModelClass | None:
    """Return the class to load a model by, None for a causal language model; ValueError for a
    class that the format does not hold."""
    if exporter.takes_any_class:
        return kind_of(read_config(model), model)
    if not is_gguf(model):
        config = read_config(model)
        is_one_graph = not (getattr(config, "is_encoder_decoder", False) or takes_images(config))
        instead = "dense and onnx take it" if is_one_graph else "dense takes it"
        check_causal(config, model, f"{exporter.name} holds", instead=instead)
    return None


def _written(model: Any, tokenizer: Any) -> Tensor:
    """Return tokens (n,) of a few sequences that `model` writes itself."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_self(model, tokenizer, N_WRITTEN, folder, kind=RAW, seq_len=WINDOW)
    return written.flatten()
