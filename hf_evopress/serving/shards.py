"""Packed layers inside a layer of a server: what they hold, how they are loaded, what they compute.

A server's layer may stand for several of the checkpoint: queries, keys and values, or gate and
up. Each keeps its own level and packed tensors, and their outputs stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..loading.checks import tensor_checksum
from ..loading.embedding import CompressedEmbedding
from ..loading.layers import CompressedLinear
from ..loading.packed import fixed_dtype
from ..methods import compose
from .plan_lookup import Member

QKV = {"q": 0, "k": 1, "v": 2}
# empty tensors of our checkpoints, for others: errors where we are not, the dtype of a model
EMPTY = ("weight", "like")


class PackedParts(nn.Module):
    """What a layer is made of, and what is still to be loaded.

    `parts` hold the tensors, one per member; a subclass says what it computes.
    """

    parts: nn.ModuleList

    def __init__(self, members: Sequence[Member], checksums: dict[str, str]) -> None:
        super().__init__()
        self._members, self._checksums = list(members), checksums
        self._missing: set[tuple[int, str]] = set()

    def _hold(self, parts: Sequence[nn.Module]) -> None:
        device = torch.empty(0).device  # vLLM builds models inside `with device`
        self.parts = nn.ModuleList(part.to_empty(device=device) for part in parts)
        for i, part in enumerate(self.parts):
            for parameter in part.parameters():
                parameter.requires_grad_(False)
            self._missing |= {(i, name) for name in self._own(i)}

    def _own(self, i: int) -> dict[str, nn.Parameter]:
        """Return the tensors of part `i` that a checkpoint brings."""
        part = self.parts[i]
        names = part._state_names if hasattr(part, "_state_names") else ("weight",)
        return {name: part.get_parameter(name) for name in names}  # type: ignore[union-attr]

    def placeholders(self) -> dict[str, nn.Parameter]:
        """Return empty parameters by the names in the checkpoint, which load into the parts.

        For loaders that look up the parameters of a layer and call their `weight_loader`.
        """
        made: dict[str, nn.Parameter] = {}
        for i in range(len(self.parts)):
            for name, own in self._own(i).items():
                if name not in made:
                    made[name] = nn.Parameter(own.new_empty(0), requires_grad=False)
        for name in EMPTY:
            if name not in made:
                nothing = torch.empty(0, dtype=torch.uint8)
                made[name] = nn.Parameter(nothing, requires_grad=False)
        for name, parameter in made.items():
            parameter.weight_loader = partial(self.load, name)  # type: ignore[attr-defined]
        return made

    @torch.no_grad()
    def load(self, name: str, _: Any, tensor: Tensor, shard: int | str | None = None) -> None:
        """Take a tensor of the checkpoint; `shard` says of which part it is."""
        i = self._index(getattr(tensor, "shard_id", None) if shard is None else shard)
        member, own = self._members[i], self._own(i)
        if name not in own:
            if name in EMPTY and not tensor.numel():
                return
            raise ValueError(
                f"{member.unit} is at level '{member.level}', which has no tensor {name!r}"
            )
        wanted, full = own[name], f"{member.unit}.{name}"
        fixed = not member.level.is_dense and name in fixed_dtype(member.level, member.shape)
        if tensor.shape != wanted.shape or (fixed and tensor.dtype != wanted.dtype):
            raise ValueError(
                f"{full} is {tensor.dtype} {tuple(tensor.shape)}, not {wanted.dtype} "
                f"{tuple(wanted.shape)}, of level '{member.level}'; download or export it again"
            )
        if self._checksums.get(full, value := tensor_checksum(tensor)) != value:
            raise ValueError(f"{full} is damaged: another checksum; download it again")
        wanted.data.copy_(tensor)
        self._missing.discard((i, name))

    def _index(self, shard: int | str | None) -> int:
        i = QKV.get(shard, shard) if isinstance(shard, str) else shard
        if i is None and len(self._members) == 1:
            return 0
        if not isinstance(i, int) or not 0 <= i < len(self._members):
            units = ", ".join(member.unit for member in self._members)
            raise ValueError(f"part {shard!r} of a layer made of {units}")
        return i

    def finish(self, runtime: str) -> None:
        """Get ready to compute; raises ValueError that names what was not loaded."""
        if self._missing:
            names = sorted(f"{self._members[i].unit}.{name}" for i, name in self._missing)
            raise ValueError(
                f"the checkpoint lacks {len(names)} packed tensors: {', '.join(names[:8])}; "
                "download or export it again"
            )
        for part in self.modules():
            if isinstance(part, (CompressedLinear, CompressedEmbedding)):
                part.prepare(runtime)


class Shards(PackedParts):
    """x (..., in) -> (..., the outputs of all members)."""

    def __init__(
        self, members: Sequence[Member], dtype: torch.dtype, checksums: dict[str, str]
    ) -> None:
        super().__init__(members, checksums)
        self._hold([_linear(member, dtype) for member in members])

    def set_bias(self, bias: Tensor) -> None:
        """Let each part add its share of `bias`, as the layers of the checkpoint do."""
        sizes = [member.shape[0] for member in self._members]
        for part, own in zip(self.parts, bias.split(sizes), strict=True):
            part.bias = nn.Parameter(own, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class SharedRows(PackedParts):
    """A packed embedding, and the head that has the same weight."""

    def __init__(self, member: Member, dtype: torch.dtype, checksums: dict[str, str]) -> None:
        super().__init__([member], checksums)
        empty = compose.empty(member.level, member.shape, dtype)
        self._hold([CompressedEmbedding(member.level, member.shape, empty, dtype=dtype)])
        state = self._own(0)
        self.head = CompressedLinear(member.level, member.shape, {**state}, None, dtype=dtype)
        self.head.is_tied = True

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows (..., features) of token ids (...)."""
        return self.parts[0](ids)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., tokens) of hidden states (..., features)."""
        return self.head(x)


def _linear(member: Member, dtype: torch.dtype) -> nn.Module:
    rows, columns = member.shape
    if member.level.is_dense:
        return nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
    return CompressedLinear.empty(member.level, member.shape, dtype=dtype)
