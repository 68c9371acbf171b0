"""Convert a compressed model to another format, for programs without hf_evopress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.repair import load, tokenizer_of
from ..base.devices import on_device
from ..base.plugins import load as load_plugin
from ..base.target import writes_out
from ..loading.replace import blank_linears
from ..methods.base import State
from ..models.plain import match_plan
from ..plans.level import Level
from ..plans.plan import Plan


@on_device
@writes_out("model")
def convert(model: str, out: str | Path, *, format: str, overwrite: bool = False) -> Path:
    """Return `out` with the compressed `model`, a folder or Hub name, in an export format.

    format: a name in `hf-evopress list`, such as dense or compressed_tensors. Everything that was
    trained comes along; units that the format has no place for raise ValueError by name.
    """
    exporter = load_plugin("export", format)()
    packed = load(model, dtype="auto")
    plan = getattr(getattr(packed.config, "quantization_config", None), "plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(f"{model} is not a compressed model of hf_evopress: it has no plan")
    held = blank_linears(
        packed
    )  # the exporter fills them, once, and adds what levels add to biases

    def states(unit: str, level: Level) -> State:
        return dict(held[unit].state)

    stock: Any = packed.dequantize()
    match_plan(stock, plan)
    return exporter.save(stock, plan, states, out, tokenizer=tokenizer_of(model))
