"""The menu is fine enough to use a budget, and fits every unit it is offered to."""

from __future__ import annotations

import pytest

from hf_evopress import compose
from hf_evopress.menu import default_levels, fits, menus


def test_the_default_menu_has_all_bit_widths_and_steps_between_them() -> None:
    (menu,) = menus({"a": (128, 256)}).values()
    costs = [compose.cost_bits(level, (128, 256)) / (128 * 256) for level in menu]
    assert costs == sorted(costs) and len(set(costs)) == len(default_levels())
    assert costs[0] < 2.3 and costs[-1] > 8.2


def test_levels_that_do_not_fit_a_unit_are_left_out_of_the_default_menu() -> None:
    found = menus({"a": (64, 576), "b": (64, 1536)})
    assert all(fits(level, (64, 576)) for level in found["a"]) and len(found["a"]) < len(found["b"])


@pytest.mark.parametrize(("columns", "group"), [(96, 32), (80, 16), (100, -1)])
def test_an_odd_width_falls_back_to_the_largest_group_it_takes(columns: int, group: int) -> None:
    (menu,) = menus({"a": (8, columns)}).values()
    assert f"gptq:bits=3,group_size={group}" in map(str, menu) and len(menu) >= 6


def test_a_written_menu_that_does_not_fit_names_unit_and_way_out() -> None:
    with pytest.raises(ValueError, match=r"layer\.up: .*128.*64"):
        menus({"layer.up": (64, 576)}, ["gptq:bits=3,group_size=128"])


def test_a_level_given_twice_is_refused_even_in_another_spelling() -> None:
    with pytest.raises(ValueError, match="given twice"):
        menus({"a": (8, 64)}, ["rtn:bits=3,group_size=64", "rtn:group_size=64,bits=3"])
