"""The two streams are what the dense and the compressed model compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.calibration.input_moments import unit_inputs
from hf_evopress.calibration.two_streams import cross_moments, input_groups, input_of, two_streams
from hf_evopress.methods.compose import compress, normalize
from hf_evopress.models.patching import operators, patched
from hf_evopress.models.stream import BlockStream
from hf_evopress.models.units import find_units

LEVEL = normalize("rtn:bits=2,group_size=32")


@pytest.fixture(scope="module")
def stream(tiny_model: Callable[..., nn.Module]) -> BlockStream:
    return BlockStream(tiny_model().requires_grad_(False))


@pytest.fixture(scope="module")
def tokens(text_tokens: Callable[..., Tensor]) -> Tensor:
    return text_tokens(4, 16)


@torch.no_grad()
def test_streams_end_where_the_models_do(stream: BlockStream, tokens: Tensor) -> None:
    model = stream.model
    units = find_units(model)
    levels = {unit.name: LEVEL for unit in units}
    states = {
        u: compress(LEVEL, model.get_submodule(u).weight.float(), None)  # type: ignore[arg-type]
        for u in levels
    }
    streams = two_streams(stream, tokens, tokens[:1])["gram"]
    forwards = operators(model, levels, states)
    for _ in range(stream.n_blocks):
        streams.aim()
        with patched(model, forwards):
            streams.advance()
    torch.testing.assert_close(stream.head(tokens, streams.dense[0]), model(tokens).logits)
    with patched(model, forwards):
        assert torch.equal(stream.head(tokens, streams.compressed[0]), model(tokens).logits)


@torch.no_grad()
def test_inputs_come_in_groups_and_in_order(stream: BlockStream, tokens: Tensor) -> None:
    names = [u.name for u in find_units(stream.model) if u.block == 0]
    groups = input_groups(stream, 0, stream.embed(tokens), names[::-1])
    assert [{name.rpartition(".")[2] for name in group} for group in groups] == [
        {"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"},
    ]  # fmt: skip


@torch.no_grad()
def test_an_input_is_seen_without_running_the_rest(stream: BlockStream, tokens: Tensor) -> None:
    name = "model.layers.0.mlp.gate_proj"
    hidden = stream.embed(tokens)
    with unit_inputs(stream.model, [name]) as seen:
        stream.run_block(0, hidden)
    assert torch.equal(input_of(stream, 0, name, hidden), seen[name])


@torch.no_grad()
def test_equal_streams_have_no_shift(stream: BlockStream, tokens: Tensor) -> None:
    sets = two_streams(stream, tokens, tokens[:1])
    name = "model.layers.0.mlp.down_proj"
    for streams in sets.values():
        streams.aim([name])
    stats, shift = cross_moments(sets, name, {})
    assert shift is not None and not shift.gram.any()
    assert stats.n_tokens == tokens.numel() and stats.sink is not None


def test_patches_are_undone_after_an_error(stream: BlockStream) -> None:
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(KeyError), patched(stream.model, {name: lambda x: x}):
        raise KeyError("some error")
    assert "forward" not in stream.model.get_submodule(name).__dict__


@torch.no_grad()
def test_the_shift_is_what_both_models_read(stream: BlockStream, tokens: Tensor) -> None:
    model, names = stream.model, [u.name for u in find_units(stream.model) if u.block == 0]
    forwards = operators(
        model,
        dict.fromkeys(names[:1], LEVEL),
        {u: compress(LEVEL, model.get_submodule(u).weight.float(), None) for u in names[:1]},  # type: ignore[arg-type]
    )
    sets = two_streams(stream, tokens, tokens[:1])
    for streams in sets.values():
        streams.aim(names)
    name = names[-1]
    x = input_of(stream, 0, name, stream.embed(tokens))
    with patched(model, forwards):
        own = input_of(stream, 0, name, stream.embed(tokens))
    assert x is not None and own is not None
    x, own = (t.flatten(0, 1) for t in (x, own))
    stats, shift = cross_moments(sets, name, forwards)
    assert shift is not None and shift.gram.any()
    torch.testing.assert_close(shift.gram, (x - own).T @ own / len(x))
    torch.testing.assert_close(stats.gram, own.T @ own / len(x))
    rounded = two_streams(stream, tokens, tokens[:1], bfloat16=True)
    for streams in rounded.values():
        streams.aim(names)
    near, _ = cross_moments(rounded, name, forwards)
    assert not torch.equal(near.gram, stats.gram)
    assert torch.equal(rounded["heldout"].targets[0], sets["heldout"].targets[0])
    torch.testing.assert_close(near.gram, stats.gram, rtol=0.1, atol=1e-3)
