"""Packed layers inside a layer of a server: loading by name, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.loading.checks import tensor_checksum
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.plans.level import Level
from hf_evopress.serving.plan_lookup import Member
from hf_evopress.serving.shards import Shards, SharedRows

LEVELS = (
    "rtn:bits=4,group_size=32",
    "dense",
    "magnitude:sparsity=0.5 + lowrank:rank=4",
)
ROWS, COLUMNS = (48, 16, 32), 64


def members() -> list[Member]:
    levels = [compose.normalize(level) for level in LEVELS]
    return [Member(f"m.{n}", v, (r, COLUMNS)) for n, v, r in zip("qkv", levels, ROWS, strict=True)]


def states(made: list[Member]) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    found = []
    for member in made:
        W = torch.randn(member.shape)
        dense = member.level.is_dense
        stats = Stats(torch.eye(COLUMNS))
        found.append({"weight": W} if dense else compose.compress(member.level, W, stats))
    return found


def loaded(checksums: dict[str, str] | None = None, **options: Any) -> tuple[Shards, list[Any]]:
    made = members()
    own, shards = states(made), Shards(made, torch.float32, checksums or {})
    places = shards.placeholders()
    for id_, state in zip("qkv", own, strict=True):
        for name, tensor in state.items():
            places[name].weight_loader(places[name], tensor, id_)  # type: ignore[attr-defined]
    return shards, own


def by_hand(own: list[Any], x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what layers of the checkpoint compute, side by side."""
    outputs = []
    parts = [None] * 3 if bias is None else bias.split(ROWS)
    for member, state, part in zip(members(), own, parts, strict=True):
        if member.level.is_dense:
            outputs.append(nn.functional.linear(x, state["weight"], part))
            continue
        layer = CompressedLinear.from_state(
            member.level, state, part, member.shape, dtype=torch.float32
        )
        layer.prepare("auto")
        outputs.append(layer(x))
    return torch.cat(outputs, -1)


@pytest.mark.parametrize("with_bias", [False, True])
@torch.no_grad()
def test_parts_compute_what_their_layers_do_side_by_side(with_bias: bool) -> None:
    shards, own = loaded()
    bias = torch.randn(sum(ROWS)) if with_bias else None
    if bias is not None:
        shards.set_bias(bias)
    shards.finish("auto")
    for n_tokens in (1, 40):
        x = torch.randn(n_tokens, COLUMNS)
        assert torch.equal(shards(x), by_hand(own, x, bias))


def test_no_part_holds_a_dense_weight_but_those_that_are_dense() -> None:
    shards, own = loaded()
    shards.finish("auto")
    stored = sum(t.nbytes for t in shards.parameters())
    assert stored == sum(t.nbytes for state in own for t in state.values())


def test_tensors_may_bring_the_name_of_their_part() -> None:
    shards = Shards(members(), torch.float32, {})
    weight = states(members())[1]["weight"]
    weight.shard_id = "k"  # type: ignore[attr-defined]
    place = shards.placeholders()["weight"]
    place.weight_loader(place, weight)  # type: ignore[attr-defined]
    assert torch.equal(shards.parts[1].weight, weight)


def test_the_empty_tensors_of_our_checkpoints_are_passed_over() -> None:
    shards = Shards(members(), torch.float32, {})
    place = shards.placeholders()["weight"]
    place.weight_loader(place, torch.empty(0, dtype=torch.uint8), "q")  # type: ignore[attr-defined]


def test_what_is_missing_is_named() -> None:
    shards = Shards(members()[:1], torch.float32, {})
    with pytest.raises(ValueError, match="lacks 3 packed tensors: m.q.codes, m.q.sca"):
        shards.finish("auto")


@pytest.mark.parametrize(
    "name, tensor, shard, said",
    [
        ("codes", torch.zeros(3, 3, dtype=torch.uint8), "q", r"m.q.codes is torch.uint8 \(3, 3\)"),
        ("scales", torch.zeros(48, 2, dtype=torch.float64), "q", "m.q.scales is torch.float64"),
        ("codes", torch.zeros(3, dtype=torch.uint8), "k", "'dense', which has no tensor 'codes'"),
        ("weight", torch.zeros(48, 64), "q", "which has no tensor 'weight'"),
        ("weight", torch.zeros(48, 64), "z", "part 'z' of a layer made of m.q, m.k, m.v"),
        ("weight", torch.zeros(48, 64), None, "part None"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    name: str, tensor: Tensor, shard: str | None, said: str
) -> None:
    shards = Shards(members(), torch.float32, {})
    place = shards.placeholders()[name]
    with pytest.raises(ValueError, match=said):
        place.weight_loader(place, tensor, shard)  # type: ignore[attr-defined]


def test_a_damaged_tensor_is_refused() -> None:
    own = states(members())
    checksums = {f"m.q.{name}": tensor_checksum(tensor) for name, tensor in own[0].items()}
    loaded(checksums)  # as they are
    with pytest.raises(ValueError, match="m.q.codes is damaged"):
        loaded({**checksums, "m.q.codes": "00000000"})


@torch.no_grad()
def test_embedding_and_head_share_packed_rows() -> None:
    level = Level.parse("rtn:bits=4,group_size=32")
    torch.manual_seed(0)
    W = torch.randn(256, COLUMNS)
    state = compose.compress(compose.normalize(level), W, None)
    rows = SharedRows(Member("embed", compose.normalize(level), (256, COLUMNS)), torch.float32, {})
    for name, place in rows.placeholders().items():
        if name in state:
            place.weight_loader(place, state[name])  # type: ignore[attr-defined]
    rows.finish("packed")
    ids, x = torch.tensor([3, 250, 3]), torch.randn(2, COLUMNS)
    dense = compose.decompress(compose.normalize(level), state, (256, COLUMNS), torch.float32)
    assert torch.equal(rows.look_up(ids), dense[ids])
    assert torch.equal(rows(x), nn.functional.linear(x, dense))
    assert sum(p.nbytes for p in rows.parameters()) == sum(t.nbytes for t in state.values())
