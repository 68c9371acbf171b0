"""A level store is whole or resumable, tells damage from data, and never mixes settings."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.menu import menus
from hf_evopress.models.units import find_units
from hf_evopress.store import unit_file
from hf_evopress.store.level_store import LevelStore, Source
from hf_evopress.store.unit_file import share

LEVELS = ["gptq:bits=2,group_size=32", "gptq:bits=3,group_size=32", "rtn:bits=4,group_size=32"]


def _stats(model: nn.Module) -> Callable[[int], dict[str, Stats]]:
    def of_block(block: int) -> dict[str, Stats]:
        shared: dict[Any, Stats] = {}
        found = {}
        for unit in find_units(model):
            if unit.block == block:
                key = (unit.name.split(".")[3], unit.shape[1], "o_proj" in unit.name)
                g = torch.Generator().manual_seed(block * 10 + unit.shape[1])
                X = torch.randn(256, unit.shape[1], generator=g)
                shared.setdefault(key, Stats(X.T @ X / 256, n_tokens=256, heldout=X.T @ X / 256))
                found[unit.name] = shared[key]
        return found

    return of_block


def _source(model: nn.Module, **fingerprint: Any) -> Source:
    G = {u.name: torch.eye(u.shape[0]) for u in find_units(model)}
    return Source({"model": "tiny", **fingerprint}, _stats(model), lambda block: G)


def _build(
    model: nn.Module, folder: Path, source: Source | None = None, **kwargs: Any
) -> LevelStore:
    units = find_units(model)
    offered = menus({u.name: u.shape for u in units}, kwargs.pop("levels", LEVELS))
    return LevelStore.build(folder, model, units, offered, source or _source(model), **kwargs)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model("llama")


def test_states_are_those_of_the_levels_made_one_by_one(model: nn.Module, tmp_path: Path) -> None:
    built = _build(model, tmp_path)
    for name, unit in built.units.items():
        W, stats = model.get_submodule(name).weight, _stats(model)(unit.block)[name]
        for level in built.levels(name):
            alone = compose.compress(level, W.detach(), stats)
            state = built.state(name, level)
            assert all(torch.equal(state[k], alone[k]) for k in alone) and len(state) == len(alone)


def test_files_hold_the_declared_bits_and_one_percent(model: nn.Module, tmp_path: Path) -> None:
    built = _build(model, tmp_path)
    declared = sum(built.cost_bits(u, x) for u in built.units for x in built.levels(u))
    stored = sum(
        t.numel() * t.element_size() * 8
        for u in built.units
        for x in built.levels(u)
        for t in built.state(u, x).values()
    )
    assert declared == stored


def test_scores_are_the_weighted_errors_of_the_packed_weight(
    model: nn.Module, tmp_path: Path
) -> None:
    built = _build(model, tmp_path)
    name, level = next(iter(built.units)), LEVELS[0]
    stats = _stats(model)(0)[name]
    W = model.get_submodule(name).weight.detach()
    delta = W - built.weight(name, level, torch.float32)
    scores = built.scores(name, level)
    expected = float((delta @ stats.gram * delta).sum())
    assert scores["error"] == pytest.approx(expected / float((W @ stats.gram * W).sum()), rel=1e-4)
    assert scores["sensitivity_nats"] == pytest.approx(expected / 2, rel=1e-4)
    assert scores["heldout_error"] == pytest.approx(scores["error"])


def test_a_killed_build_goes_on_with_what_is_missing(model: nn.Module, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(label: str, done: int, total: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        _build(model, tmp_path, progress=kill)
    with pytest.raises(ValueError, match="not finished: 9 of 14"):
        LevelStore(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    _build(model, tmp_path)
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    assert len(before) == 5 and len(after) == 14 and before.items() <= after.items()


def test_what_a_killed_build_left_out_of_a_group_is_made_to_the_same_bytes(
    model: nn.Module, tmp_path: Path
) -> None:
    _build(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    whole = [file.read_bytes() for file in files]
    for file in files[1::2]:  # of each group that shares an input, some
        file.unlink()
    _build(model, tmp_path)
    assert [file.read_bytes() for file in files] == whole


def test_levels_of_another_store_are_copied_and_are_the_same_bytes(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*LEVELS, "gptq:bits=3,group_size=32 + lowrank:rank=2", "trellis:bits=2,state_bits=6"]
    _build(model, tmp_path / "whole", levels=more)
    _build(model, tmp_path / "first", levels=[*more[1:3], more[4]])
    (tmp_path / "first" / "unit_00003.safetensors").unlink()  # not finished
    damaged = tmp_path / "first" / "unit_00005.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    _build(model, tmp_path / "other", _source(model, data="other"), levels=more[:1])
    asked: list[list[str]] = []
    make = compose.compress_many

    def watched(levels: Any, *given: Any) -> Any:
        asked.append([*map(str, levels)])
        return make(levels, *given)

    monkeypatch.setattr(compose, "compress_many", watched)
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "index.json").write_text('{"format_version": 99}')
    others = [tmp_path / name for name in ("newer", "first", "other", "not there")]
    _build(model, tmp_path / "second", levels=more, others=others)
    assert {len(levels) for levels in asked} == {2, 5}  # 5 where a group has a file too few
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name
    asked.clear()
    _build(model, tmp_path / "third", levels=more[:2], others=[tmp_path / "whole"])
    assert not asked


def test_levels_that_were_not_measured_are_made_again(model: nn.Module, tmp_path: Path) -> None:
    known = _source(model)
    without = Source(known.fingerprint, lambda block: {})
    rtn = ["rtn:bits=4,group_size=32"]
    first = _build(model, tmp_path / "first", without, levels=rtn)
    unit = next(iter(first.units))
    assert not first.scores(unit, rtn[0])
    second = _build(model, tmp_path / "second", known, levels=rtn, others=[tmp_path / "first"])
    assert {"error", "sensitivity_nats"} <= second.scores(unit, rtn[0]).keys()


def test_a_full_disk_leaves_nothing_half_written(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unit_file, "save_file", full)
        with pytest.raises(OSError, match=r"unit_00000\.safetensors .*no space left"):
            _build(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]
    _build(model, tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_damage_is_found_and_named(model: nn.Module, tmp_path: Path, damage: str) -> None:
    built = _build(model, tmp_path)
    name = next(iter(built.units))
    path = tmp_path / "unit_00000.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[:-100]
    else:
        data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*damaged.*run the same build again"):
        for level in built.levels(name):
            built.state(name, level)


def test_other_settings_are_refused_not_mixed_in(model: nn.Module, tmp_path: Path) -> None:
    _build(model, tmp_path)
    with pytest.raises(ValueError, match="data differ"):
        _build(model, tmp_path, _source(model, data="other"))
    with pytest.raises(ValueError, match="units or their levels differ"):
        _build(model, tmp_path, levels=["rtn:bits=8,group_size=32"])


def test_a_store_that_has_more_levels_serves(model: nn.Module, tmp_path: Path) -> None:
    whole = _build(model, tmp_path)
    unit = next(iter(whole.units))
    assert _build(model, tmp_path, levels=LEVELS[:2]).levels(unit) == whole.levels(unit)
    units = find_units(model)
    for levels, lacks in ((LEVELS[:1], False), (["dense"], True)):
        offered = menus({u.name: u.shape for u in units}, levels)
        assert LevelStore.lacks(tmp_path, units, offered, _source(model)) is lacks
    assert LevelStore.lacks(tmp_path, units, offered, _source(model, data="other")) is None
    assert LevelStore.lacks(tmp_path / "no", units, offered, _source(model)) is None


def test_nested_ranks_and_common_first_terms_are_stored_once(
    model: nn.Module, tmp_path: Path
) -> None:
    base = "gptq:bits=3,group_size=32"
    levels = [base, *(f"{base} + lowrank:rank={r}" for r in (2, 4, 8))]
    built = _build(model, tmp_path, levels=levels)
    codes = sum(built.cost_bits(unit, base) for unit in built.units)
    most = sum(built.cost_bits(unit, levels[-1]) for unit in built.units)
    assert built.size_bytes - 40_000 < most // 8 < (3 * codes + most) // 8  # less the headers
    unit = next(iter(built.units))
    large, small = built.state(unit, levels[-1]), built.state(unit, levels[1])
    assert torch.equal(large["A_1"][:2], small["A_1"])
    assert torch.equal(large["B_1"][:, :2], small["B_1"]) and small["B_1"].is_contiguous()


def test_sharing_gives_back_every_tensor_and_mixes_no_types() -> None:
    whole = torch.arange(12).view(3, 4)
    states = [
        {"x": whole[:2, :3], "y": torch.ones(2)},
        {"x": whole, "y": torch.ones(2, dtype=torch.float16)},
        {"x": whole + 1, "n": torch.empty(0)},
    ]
    stored, shared = share(states)
    assert shared == {"0/x": ("1/x", [2, 3])}
    assert set(stored) == {"1/x", "2/x", "0/y", "1/y", "2/n"}


def test_unknown_units_and_levels_are_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    built = _build(model, tmp_path)
    with pytest.raises(ValueError, match=r"no level 'rtn:bits=8,group_size=32'.*it has: gptq"):
        built.state(next(iter(built.units)), "rtn:bits=8,group_size=32")
    with pytest.raises(ValueError, match="'nope' is not in the store"):
        built.levels("nope")


def test_an_index_of_a_newer_version_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _build(model, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**index, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        LevelStore(tmp_path)


def test_a_unit_name_never_becomes_a_path(model: nn.Module, tmp_path: Path) -> None:
    built = _build(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "index.json",
        *(f"unit_{i:05d}.safetensors" for i in range(len(built.units))),
    }


def test_a_method_with_another_default_makes_another_level_of_the_same_name(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = _build(model, tmp_path)
    units = list(built.units.values())
    offered = menus({u.name: u.shape for u in units}, LEVELS)
    assert LevelStore.lacks(tmp_path, units, offered, _source(model)) is False
    gptq = compose.method("gptq")
    changed = {**gptq.params, "damp": dataclasses.replace(gptq.params["damp"], default=0.2)}
    monkeypatch.setattr(type(gptq), "params", changed)
    assert LevelStore.lacks(tmp_path, units, offered, _source(model)) is None
    with pytest.raises(ValueError, match="the defaults of gptq differ"):
        _build(model, tmp_path)
    others = menus({u.name: u.shape for u in units}, LEVELS[2:])  # rtn is as it was
    assert LevelStore.lacks(tmp_path, units, others, _source(model)) is False


def test_a_parameter_that_came_later_leaves_stores_as_they_are(
    model: nn.Module, tmp_path: Path
) -> None:
    built = _build(model, tmp_path)
    units = list(built.units.values())
    offered = menus({u.name: u.shape for u in units}, LEVELS)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["defaults"]["gptq"]["damp"]  # as a version without it wrote
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert LevelStore.lacks(tmp_path, units, offered, _source(model)) is False
    index["defaults"]["gptq"]["gone"] = 1  # what this version does not know may mean anything
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert LevelStore.lacks(tmp_path, units, offered, _source(model)) is None


def test_methods_are_told_how_the_loss_feels_each_output(model: nn.Module, tmp_path: Path) -> None:
    """Trellis codes round on both sides where there are sensitivities, and on one where not."""
    level = "trellis:bits=2,state_bits=6"
    mixed = {}
    for u in find_units(model):
        g = torch.Generator().manual_seed(u.shape[0])
        X = torch.randn(64, u.shape[0], generator=g) @ torch.randn(*u.shape[:1] * 2, generator=g)
        mixed[u.name] = X.T @ X / 64
    told = Source({"model": "tiny"}, _stats(model), lambda block: mixed)
    untold = dataclasses.replace(told, moments=None)
    both, one, alike = (
        _build(model, tmp_path / name, source, levels=[text])
        for name, source, text in (
            ("both", told, level),
            ("one", untold, level),
            ("alike", told, f"{level},feedback=inputs"),
        )
    )
    nats = 0.0
    for unit in both.units:
        codes = [
            store.state(unit, str(store.levels(unit)[0]))["codes"] for store in (both, one, alike)
        ]
        assert torch.equal(codes[1], codes[2]) and not torch.equal(codes[0], codes[1])
        nats += alike.scores(unit, f"{level},feedback=inputs")["sensitivity_nats"]
        nats -= both.scores(unit, level)["sensitivity_nats"]
    assert nats > 0
