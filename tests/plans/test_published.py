"""The official text formats: read, checked against a model, written back as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from hf_evopress import Plan
from hf_evopress.models.skeleton import fit_to
from hf_evopress.models.units import find_units
from hf_evopress.plans.published import (
    config_files,
    parse_published,
    published_text,
    read_published,
    to_plan,
)

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
SHAPES = {
    f"model.layers.{i}.{kind}": (1024, 4096 if "down" in kind else 2048)
    for i in range(12)
    for kind in KINDS
}


def lines(order: list[str], values: list[int]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in zip(order, values, strict=True))


def by_size() -> list[str]:
    """The order of files whose search goes group by group: all blocks of one, then the next."""
    groups = [KINDS[2:], KINDS[:2]]
    return [f"model.layers.{i}.{k}" for group in groups for i in range(12) for k in group]


ORDERS = {
    "by block": list(SHAPES),
    "by name": sorted(SHAPES),
    "by group": by_size(),
    "by nothing": [*list(SHAPES)[::-1][:7], *list(SHAPES)[: len(SHAPES) - 7]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_bits_come_back_in_the_order_and_bytes_of_the_file(order: str) -> None:
    text = lines(ORDERS[order], [2 + i % 4 for i in range(48)])
    plan = to_plan(parse_published(text), shapes=SHAPES)
    assert plan.shapes == SHAPES
    assert published_text(Plan.from_json(plan.to_json())) == text


def test_bits_become_the_level_that_is_asked_for() -> None:
    text = "model.layers.0.mlp.up_proj: 3\nmodel.layers.0.mlp.down_proj: 16"
    plan = to_plan(parse_published(text), level="rtn:bits={bits},group_size=64")
    assert str(plan["model.layers.0.mlp.up_proj"]) == "rtn:bits=3,group_size=64"
    assert plan["model.layers.0.mlp.down_proj"].is_dense
    assert set(published_text(plan).splitlines()) == set(text.splitlines())


def test_a_sparsity_level_moves_the_same_number_of_weights_in_every_layer() -> None:
    values = [1, -1, 2, -2] * 12
    config = parse_published(lines(list(SHAPES), values), name="Some-Model_50.txt")
    plan = to_plan(config, shapes=SHAPES, step=100_000)
    for (unit, (rows, columns)), k in zip(SHAPES.items(), values, strict=True):
        sparsity = float(plan[unit].terms[0].kwargs["sparsity"])
        zeros = sparsity * rows * columns
        assert zeros == pytest.approx(0.5 * rows * columns + k * 100_000, abs=1)


def test_sparsity_levels_come_back() -> None:
    text = lines(sorted(SHAPES), [0, 1, -1, 0] * 12)
    plan = to_plan(parse_published(text), shapes=SHAPES, sparsity=0.7, step=90_000)
    assert published_text(Plan.from_json(plan.to_json())) == text


@pytest.mark.parametrize("name, sparsity", [("M-7B-v0.3_70.txt", 0.7), ("x_0.55.txt", 0.55)])
def test_the_base_sparsity_is_read_from_the_end_of_the_name(name: str, sparsity: float) -> None:
    config = parse_published(lines(list(SHAPES), [0] * 48), name=name)
    assert to_plan(config, shapes=SHAPES).search["published"]["sparsity"] == sparsity


def test_a_base_sparsity_that_is_nowhere_has_to_be_given() -> None:
    config = parse_published(lines(list(SHAPES), [0] * 48), name="config.txt")
    with pytest.raises(ValueError, match="give it: sparsity=0.5"):
        to_plan(config, shapes=SHAPES)


def test_a_wrong_step_is_noticed() -> None:
    config = parse_published(lines(list(SHAPES), [8, -8] * 24), name="m_50.txt")
    with pytest.raises(ValueError, match=r"would have sparsity 4.31.*step 1000000"):
        to_plan(config, shapes=SHAPES)


def test_dropped_sub_blocks_come_back() -> None:
    text = "none\nattn\nmlp\nattn+mlp\nnone\n"
    plan = to_plan(parse_published(text))
    assert list(plan) == [
        "model.layers.1.self_attn",
        "model.layers.2.mlp",
        "model.layers.3.mlp",
        "model.layers.3.self_attn",
    ]
    assert published_text(Plan.from_json(plan.to_json())) == text


def test_a_searched_drop_plan_is_written_once_the_number_of_blocks_is_said() -> None:
    plan = Plan({"model.layers.1.self_attn": "drop"})
    assert published_text(plan, n_blocks=3) == "none\nattn\nnone\n"
    with pytest.raises(ValueError, match="how many blocks"):
        published_text(plan)


def test_a_plan_that_the_format_cannot_say_is_refused() -> None:
    plan = Plan({"model.layers.1.mlp.up_proj": "rtn:bits=3,group_size=64 + lowrank:rank=4"})
    with pytest.raises(ValueError, match="holds whole bits only"):
        published_text(plan)


@pytest.fixture
def model_folder(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> Path:
    tiny_model().config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_configuration_is_checked_against_the_model(
    model_folder: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    units = [unit.name for unit in find_units(tiny_model())]
    shapes, names = fit_to(parse_published("none\nattn"), str(model_folder))
    assert set(shapes) == set(units)
    assert names(1, "attn") == "model.layers.1.self_attn"
    config = parse_published(lines([*units[1:], "model.layers.2.mlp.up_proj"], [3] * len(units)))
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj: not in the model"):
        to_plan(config, shapes=shapes)


def test_a_drop_configuration_of_another_depth_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="has 3 lines, .* has 2 blocks"):
        fit_to(parse_published("none\nattn\nmlp"), str(model_folder))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "1 to 200000 lines, got 0"),
        ("a.b: 3\na.b: 4", "line 2: a.b is given twice"),
        ("a.b: three", "line 1: 'a.b: three' is not 'module: whole number'"),
        ("a.b: 3\n../etc/passwd: 3", "line 2"),
        ("none\nattn+mpl", "line 2: 'attn[+]mpl' is none of none, attn"),
        ("a.b: 900", "bits are 1 to 16"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_published(text)


def test_a_folder_gives_its_text_files_and_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m_3bit.txt").write_text("a.0.b: 3")
    (tmp_path / "outside.txt").symlink_to("/etc/hostname")
    assert config_files(tmp_path) == [tmp_path / "a" / "m_3bit.txt"]


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("garbage")
    with pytest.raises(ValueError, match=r"m.txt: line 1"):
        read_published(tmp_path / "m.txt")
