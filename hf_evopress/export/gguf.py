"""One GGUF file, which llama.cpp and the many programs around it run.

Levels `gguf:type=...` are its tensor types, so that their bytes go into the file as they are;
embedding and head too. Dense layers are stored in their own 16 bits, norms and biases in 32.
Everything else is refused by name, or with `requantise` rounded by ggml to the smallest type that
has at least its bits. For Llama, Mistral, Qwen2 and Qwen3 with byte-level BPE tokenizers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import compose
from ..methods.base import State
from ..methods.maths.ggml.encoder import encode
from ..methods.maths.ggml.types import KINDS, Kind
from ..models.ends import is_tied
from ..models.plain import make_plain, make_stock
from ..plans.level import Level
from ..plans.plan import Plan
from .base import Export, States
from .dense import write_weights
from .gguf_format.architecture import architecture_of, row_order
from .gguf_format.file import Entry, extra_entries, names_of, write_file, writer_of

FILE = "model.gguf"
# ggml's own choice of types without an importance matrix, smallest first
PLAIN = ("q2_k", "q3_k", "iq4_nl", "q4_k", "q5_0", "q5_k", "q6_k", "q8_0")


class GGUFExport(Export):
    """A file for llama.cpp; layers at `gguf:type=...` as they are."""

    name = "gguf"
    can_requantise = True

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        architecture_of(model.config)
        plan, states = self._representable(model, plan, states)
        write_weights(model, plan, states)
        make_stock(model)
        entries = entries_of(model, plan)
        source = plan.base_model
        name = Path(source).name if source else "model"
        writer = writer_of(model.config, self.tokenizer, name=name, source=source)
        tensors = model.state_dict()

        def data(entry: Entry) -> Tensor:
            if entry.name not in origin:
                return extra_entries(model.config)[entry.name]
            ours = origin[entry.name]
            if entry.kind is not None:
                unit = ours.removesuffix(".weight")
                tensor = states(unit, plan[unit])["blocks"].cpu()
            else:
                tensor = tensors[ours].detach().cpu().to(entry.dtype)
            order = row_order(ours, model.config)
            return tensor if order is None else tensor[order]

        origin = {theirs: ours for ours, theirs in _names(model).items()}
        write_file(folder / FILE, writer, entries, data)

    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Raise RuntimeError unless the tensors of the file are those that were to be written."""
        from gguf import GGUFReader
        from gguf.quants import dequantize

        plan, states = self._representable(model, plan, states)
        tensors = model.state_dict()
        there = {tensor.name: tensor for tensor in GGUFReader(folder / FILE).tensors}
        for ours, theirs in _names(model).items():
            found = torch.tensor(dequantize(there[theirs].data, there[theirs].tensor_type))
            unit, wanted = ours.removesuffix(".weight"), tensors[ours].float().cpu()
            if unit in plan and not plan[unit].is_dense:
                shape = (wanted.shape[0], wanted.shape[1])
                wanted = compose.decompress(
                    plan[unit], states(unit, plan[unit]), shape, torch.float32
                ).cpu()
            if (order := row_order(ours, model.config)) is not None:
                wanted = wanted[order]
            if not torch.equal(found.view_as(wanted), wanted):
                raise RuntimeError(
                    f"{ours} in the GGUF file is not what the plan says; report this"
                )
        make_plain(model)

    def _representable(self, model: Any, plan: Plan, states: States) -> tuple[Plan, States]:
        """Return plan and states of types that the file has, rounded where that was asked for."""
        if self._rounded is None:
            self._rounded = self._round(model, plan, states)
        made = self._rounded[1]

        def get(unit: str, level: Level) -> State:
            return made[unit] if unit in made else states(unit, level)

        return self.shipped(plan), get

    def shipped(self, plan: Plan) -> Plan:
        rounded = self._rounded[0] if self._rounded else {}
        return plan.replace(
            levels={u: str(x) for u, x in {**dict(plan.items()), **rounded}.items()}
        )

    _rounded: tuple[dict[str, Level], dict[str, State]] | None = None

    def _round(
        self, model: Any, plan: Plan, states: States
    ) -> tuple[dict[str, Level], dict[str, State]]:
        wrong = {unit: level for unit, level in plan.items() if not fits_file(level)}
        if dropped := [unit for unit, level in wrong.items() if level.is_drop]:
            raise ValueError(
                f"gguf: {dropped[0]} is dropped, and a GGUF file has every sub-block; export to "
                "dense or pruned instead"
            )
        if wrong and not self.requantise:
            unit, level = next(iter(wrong.items()))
            raise ValueError(
                f"gguf: a GGUF file cannot hold the levels of {len(wrong)} units, such as "
                f"'{level}' of {unit}: compress with --for gguf, whose levels it holds, or say "
                "--requantise to have others rounded to the nearest of its types"
            )
        levels: dict[str, Level] = {}
        made: dict[str, State] = {}
        for unit, level in wrong.items():
            shape = tuple(model.get_submodule(unit).weight.shape)
            state = states(unit, level)
            if compose.bias_fix(level, state) is not None:
                raise ValueError(
                    f"gguf: level '{level}' of {unit} corrects a bias; leave centred out"
                )
            W = compose.decompress(level, state, (shape[0], shape[1]), torch.float32)
            kind = nearest_kind(compose.cost_bits(level, (shape[0], shape[1])), shape)
            if kind is None:
                levels[unit] = compose.normalize("dense")
                continue
            levels[unit] = compose.normalize(f"gguf:type={kind.name},feedback=false")
            made[unit] = {"blocks": encode(kind, W, None)}
        return levels, made


def fits_file(level: Level) -> bool:
    """Return whether a level is a type of GGUF files, or dense."""
    return level.is_dense or (len(level.terms) == 1 and level.terms[0].method == "gguf")


def nearest_kind(cost_bits: int, shape: tuple[int, ...]) -> Kind | None:
    """Return the smallest type for rows of that width with at least as many bits, if any."""
    bits = cost_bits / (shape[0] * shape[1])
    able = [KINDS[n] for n in PLAIN if shape[1] % KINDS[n].block == 0]
    if not able:
        return None
    return next((k for k in able if k.bits_per_weight >= bits), able[-1])


def entries_of(
    model: Any, plan: Plan | Mapping[str, Level], *, leave_out: Collection[str] = ()
) -> list[Entry]:
    """Return the tensors of the file of `model`, stock or on the meta device, at a plan's levels.

    leave_out: our names of tensors to leave out.
    """
    tensors = model.state_dict()
    entries = []
    for ours, theirs in _names(model).items():
        if ours in leave_out:
            continue
        tensor, unit = tensors[ours], ours.removesuffix(".weight")
        level, kind = plan.get(unit), None
        if level is not None and not level.is_dense:
            kind = KINDS[str(level.terms[0].kwargs["type"])]
        dtype = tensor.dtype if tensor.ndim > 1 else torch.float32
        entries.append(Entry(theirs, tuple(tensor.shape), kind, dtype))
    for name, tensor in extra_entries(model.config).items():
        entries.append(Entry(name, tuple(tensor.shape)))
    return entries


def _names(model: Any) -> Mapping[str, str]:
    """Return our names of the tensors that are written -> llama.cpp's."""
    ours = [k for k in model.state_dict() if not is_tied(model, k.rpartition(".")[0])]
    return names_of(model.config, ours)
