"""A checkpoint of compressed-tensors: loads in stock transformers and in vLLM, without hf_evopress.

The same codes and scales in that format's packing, which wastes no bits either. It can hold layers
at one term with codes; embedding and head are written dense. Zero points are read by transformers
5.23 only where all layers have the same level, so that plans with several need `symmetric=true`.
What vLLM does not take of a plan is said (vllm_limits.py).

Loaded in float16 the weights are those of the plan in float16, bit for bit, and without zero points
in float32, too; in bfloat16 compressed-tensors rounds float16 scales to bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..methods import compose
from ..methods.base import Method, State
from ..models.ends import find_ends
from ..plans.level import Level
from ..plans.plan import Plan
from .base import Export, States, check_loads
from .linears import not_linear, write_dense
from .vllm_limits import vllm_obstacles

logger = logging.getLogger(__name__)

Scheme = tuple[int, int, bool]

PACKAGE = 'pip install "hf-evopress[compressed-tensors]"'


class CompressedTensorsExport(Export):
    """Codes in the pack-quantized format of compressed-tensors, which vLLM reads."""

    name = "compressed_tensors"

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        plan = _without_ends(model, plan, states)
        check_plan(model, plan)
        if obstacles := vllm_obstacles(plan):
            logger.warning("stock transformers loads this; in vLLM: %s", "; ".join(obstacles))
        groups: dict[Scheme, list[str]] = {}
        for unit, level in plan.items():
            if level.is_dense:
                continue
            made = PackedLinear(level, states(unit, level), model.get_submodule(unit))
            model.set_submodule(unit, made)
            groups.setdefault(_scheme(level), []).append(unit)
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        model.config.quantization_config = _config(groups, ignore=linears)
        model.save_pretrained(folder)

    @torch.no_grad()
    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Raise RuntimeError unless stock transformers loads the weights of the plan.

        In the dtype in which compressed-tensors rounds nothing (see above).
        """
        levels = {
            unit: level
            for unit, level in plan.items()
            if isinstance(model.get_submodule(unit), PackedLinear)  # ends are dense
        }
        has_zeros = not all(_scheme(level)[2] for level in levels.values())
        dtype = torch.float16 if has_zeros else torch.float32
        for unit, level in levels.items():
            packed, state = model.get_submodule(unit), states(unit, level)
            out, columns = (int(n) for n in packed.weight_shape)
            linear = nn.Linear(columns, out, bias=False, device="meta")
            W = compose.decompress(level, state, (out, columns), dtype)
            linear.weight, linear.bias = nn.Parameter(W, requires_grad=False), packed.bias
            model.set_submodule(unit, linear)
        del model.config.quantization_config
        for parameter in model.parameters():  # not buffers: rotary tables stay in float32
            parameter.data = parameter.data.to(dtype)
        check_loads(folder, model, dtype=dtype)


def _without_ends(model: Any, plan: Plan, states: States) -> Plan:
    """Return the plan of the decoder, after writing dense weights into embedding and head."""
    names = {unit.name for unit in find_ends(model)}
    ends = {u: x for u, x in plan.items() if u in names and not x.is_dense}
    why = "compressed-tensors has no place for a packed embedding or head"
    return write_dense(model, plan, states, ends, why=why)


class PackedLinear(nn.Module):
    """Holds the tensors of one layer by the names that compressed-tensors reads."""

    def __init__(self, level: Level, state: State, linear: nn.Linear) -> None:
        super().__init__()
        from compressed_tensors.compressors.pack_quantized import pack_to_int32

        shape = (linear.out_features, linear.in_features)
        part, params, tensors, _ = next(compose.terms(level, state))
        found = part.codes(tensors, shape, **params)
        assert found is not None  # check_plan has seen that there are codes
        q, scale, zero = found
        bits, middle = params["bits"], 2 ** (params["bits"] - 1)
        made = {
            "weight_packed": pack_to_int32((q.short() - middle).to(torch.int8), bits),
            "weight_scale": scale.squeeze(-1).to(state["scales"].dtype),
            "weight_shape": torch.tensor(shape),
        }
        if not params["symmetric"]:
            centred = (zero.squeeze(-1) - middle).to(torch.int8)
            made["weight_zero_point"] = pack_to_int32(centred, bits, packed_dim=0)
        for name, tensor in made.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = linear.bias


def check_plan(model: Any, plan: Plan) -> None:
    """Raise ValueError that names the units whose level the format has no place for."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ImportError(f"this export needs compressed-tensors: {PACKAGE}") from error
    way_out = (
        "compress with levels such as --level gptq:bits=4,group_size=128,symmetric=true --level "
        "gptq:bits=8,group_size=128,symmetric=true, or use the evopress export"
    )
    wrong = [f"{unit}: {why}" for unit, why in _obstacles(model, plan)]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise ValueError(f"compressed-tensors cannot hold {'; '.join(wrong[:4])}{more}; {way_out}")
    schemes = {_scheme(level) for level in plan.levels.values() if not level.is_dense}
    if not schemes:
        raise ValueError(f"the plan leaves all layers dense; {way_out}")
    if len(schemes) > 1 and not all(symmetric for _, _, symmetric in schemes):
        levels = sorted({str(level) for level in plan.levels.values() if not level.is_dense})
        raise ValueError(
            "compressed-tensors checkpoints of several levels can be loaded only where none has "
            f"zero points; this plan has {', '.join(levels)}: {way_out}"
        )


def _obstacles(model: Any, plan: Plan) -> Iterator[tuple[str, str]]:
    others = not_linear(model, plan)
    for unit, level in plan.items():
        if unit in others:
            yield unit, others[unit]
        elif not level.is_dense and (
            len(level.terms) > 1 or not _has_codes(level, model.get_submodule(unit))
        ):
            yield unit, f"level '{level}' is not one term with codes"


def _scheme(level: Level) -> Scheme:
    """Return bits, weights per scale (-1: a whole row), and whether there are no zero points."""
    term = compose.normalize(level).terms[0]
    params = compose.method(term.method).filled(term.kwargs)
    return params["bits"], params["group_size"], params["symmetric"]


def _has_codes(level: Level, linear: nn.Linear) -> bool:
    """Return whether weights are integers with one scale per group, as the format has them."""
    part = compose.method(level.terms[0].method)
    known = type(part).codes is not Method.codes and {"group_size", "symmetric"} <= {*part.params}
    return known and "codes" in _names(level, linear)


def _names(level: Level, linear: nn.Linear) -> State:
    return compose.empty(level, (linear.out_features, linear.in_features), linear.weight.dtype)


def _config(groups: dict[Scheme, list[str]], *, ignore: list[str]) -> dict[str, Any]:
    """Return the quantization_config of a checkpoint, as compressed-tensors itself writes it."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    schemes = {}
    for number, ((bits, group_size, symmetric), units) in enumerate(sorted(groups.items())):
        grouping = (
            {"strategy": "channel"}
            if group_size == -1
            else {"strategy": "group", "group_size": group_size}
        )
        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **grouping)
        schemes[f"group_{number}"] = QuantizationScheme(targets=units, weights=weights)
    config = QuantizationConfig(
        config_groups=schemes,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=ignore,
    )
    made = dict(config.model_dump(mode="json"))
    if any(not symmetric for _, _, symmetric in groups):
        # compressed-tensors 0.20 has no room for packed zero points in a model on the meta device:
        # transformers has to decompress as it loads, for which it knows one level only
        made["dequantize"] = True
    return made
