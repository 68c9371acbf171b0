"""The menu is fine enough to use a budget, and fits every unit it is offered to."""

from __future__ import annotations

import pytest

from hf_evopress.methods import compose
from hf_evopress.methods.menu import default_levels, fits, menus


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


def test_families_add_up_and_residuals_share_their_first_terms() -> None:
    shapes = {"a": (64, 128)}
    (quant,), (residual,) = (menus(shapes, families=[f]).values() for f in ("quant", "residual"))
    assert {*quant} < {*residual}
    assert {level.terms[0] for level in residual} == {level.terms[0] for level in quant}
    (everything,) = menus(shapes, families=["all"]).values()
    assert {*residual} < {*everything} and len({*everything}) == len(everything)


def test_the_trellis_family_has_the_rates_around_the_budget_and_fits_any_shape() -> None:
    found = menus({"a": (64, 128), "b": (7, 30)}, families=["trellis"])
    tail = "codebook=weyl,scales=channels"
    words = [f"trellis:bits={b},{tail}" for b in (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6)]
    assert [str(x) for x in found["a"]] == words
    assert found["b"] == found["a"]
    for bits, rates in (
        ((3.3, 3.3), [2, 2.5, 3, 3.5, 4, 4.5, 5]),
        ((5.5, 5.5), [4, 4.5, 5, 6, 8]),
        ((20, 20), [8]),
        ((2.5, 3), [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]),
    ):
        own = menus({"a": (64, 128)}, families=["trellis"], bits=bits)
        assert [level.terms[0].kwargs["bits"] for level in own["a"]] == rates
    with pytest.raises(ValueError, match="family trellis removes no weights"):
        menus({"a": (64, 128)}, families=["trellis"], sparsity=0.5)


def test_sizes_with_a_large_odd_factor_are_rotated_in_blocks_or_not_at_all() -> None:
    shapes = {"a": (32 * 1031, 64), "b": (1031, 64)}
    found = menus(shapes, families=["trellis"])
    for unit, rotation in (("a", "32"), ("b", "none")):
        kwargs = [level.terms[0].kwargs for level in found[unit]]
        assert len(kwargs) == 10 and {own["rotation"] for own in kwargs} == {rotation}


def test_a_model_of_sizes_that_a_file_has_no_place_for_is_refused() -> None:
    shapes = {"model.q": (192, 64), "model.up": (128, 128)}
    assert str(menus(shapes, families=["exl3"])["model.q"][0]) == "dense"
    with pytest.raises(ValueError, match="family exl3, .* multiples of 128; model.q has 192 x 64"):
        menus({"model.q": (192, 64)}, families=["exl3"])


def test_ranks_are_multiples_and_smaller_than_the_weight() -> None:
    shape = (192, 576)
    (menu,) = menus({"a": shape}, families=["lowrank"], sparsity=0.2).values()
    ranks = [level.terms[0].kwargs["rank"] for level in menu if not level.is_dense]
    assert all(isinstance(r, int) and r % 8 == 0 for r in ranks)
    kept = [compose.kept_values(level, shape) for level in menu]
    assert kept == sorted(kept) and kept[-1] == 192 * 576  # dense, the last


def test_a_sparsity_budget_is_offered_steps_around_it() -> None:
    (menu,) = menus({"a": (64, 128)}, sparsity=0.6).values()
    found = sorted(level.terms[0].kwargs["sparsity"] for level in menu)
    assert found == pytest.approx([0.4 + 0.05 * n for n in range(9)])
    for level in menu:
        share = compose.kept_values(level, (64, 128)) / (64 * 128)
        assert share == pytest.approx(1 - float(level.terms[0].kwargs["sparsity"]), abs=1e-3)


def test_residuals_of_several_terms_count_all_their_values() -> None:
    level = compose.normalize("sparsegpt:sparsity=0.5 + lowrank:rank=4")
    assert compose.kept_values(level, (64, 128)) == 64 * 64 + 4 * (64 + 128)
