"""Plans of many sizes: the order survives files, prefixes are plans, wrong ones are refused."""

from __future__ import annotations

import pytest

from hf_evopress.plans.block_order import blocks_of, has_order, order_of, prefix, with_order
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

ORDER = ("up", "down", "down", "up", "up")


def make(order: tuple[str, ...] = ORDER) -> Plan:
    plan = Plan(
        {
            "down": "bitstack:rank=2,blocks=2",
            "head": "rtn:bits=6,group_size=64",
            "up": "bitstack:blocks=3",
        },
        results={"kl_nats": 0.1},
    )
    return with_order(plan, order)


def test_the_order_survives_the_file() -> None:
    assert order_of(Plan.from_json(make().to_json())) == ORDER
    assert has_order(make()) and not has_order(Plan({"up": "bitstack:blocks=3"}))


def test_a_prefix_has_fewer_blocks_and_the_rest_of_the_plan() -> None:
    plan = prefix(make(), 3)
    assert {unit: str(level) for unit, level in plan.items()} == {
        "down": "bitstack:rank=2,blocks=2",
        "head": "rtn:bits=6,group_size=64",
        "up": "bitstack:blocks=1",
    }
    assert order_of(plan) == ORDER[:3]
    assert not plan.results  # measured of another size
    assert prefix(make(), 5).levels == make().levels


def test_blocks_are_counted_of_stacks_alone() -> None:
    assert blocks_of(Level.parse("bitstack:blocks=3")) == 3
    assert blocks_of(Level.parse("bitstack:blocks=3 + lowrank:rank=2")) == 0
    assert blocks_of(Level.parse("rtn:bits=4,group_size=64")) == 0


@pytest.mark.parametrize(
    "order", [("up", "down", "down", "up"), ("down", "down", "up", "up", "up"), ("head", *ORDER)]
)
def test_an_order_of_other_blocks_than_the_levels_is_refused(order: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="does not have the blocks of its levels"):
        make(order)


@pytest.mark.parametrize("text", ["0 1 x", "0 99", "-1 0"])
def test_an_order_with_other_words_is_refused(text: str) -> None:
    plan = make().replace(search={"block_order": text})
    with pytest.raises(ValueError, match="block_order"):
        order_of(plan)


def test_a_plan_of_one_size_says_what_makes_many() -> None:
    with pytest.raises(ValueError, match="hf-evopress stack"):
        order_of(Plan({"up": "bitstack:blocks=3"}))
