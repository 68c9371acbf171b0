"""Cards: valid for the Hub, complete, and silent about what was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from hf_evopress import Plan
from hf_evopress.methods import compose
from hf_evopress.plans.block_order import with_order
from hf_evopress.plans.card_template import cell, front_matter, hub_base
from hf_evopress.plans.push import plan_card
from hf_evopress.plans.repo import FILE_NAME, entry_of
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.sharing.cards import exact_bits, is_ours, tensor_shapes, write_card

from ..hub_server import card_errors
from ..hub_server import front_matter as parse

BASE = "HuggingFaceTB/SmolLM2-135M"
ROWS: dict[str, dict[str, Any]] = {
    "dense": {"bits_per_weight": 16.0, "size_bytes": 269_000_000, "perplexity": 19.5},
    "uniform rtn:bits=3": {"bits_per_weight": 3.3, "size_bytes": 101_000_000, "perplexity": 31.4},
    "searched": {"bits_per_weight": 3.29, "size_bytes": 100_000_000, "perplexity": 26.7},
}
for name, loss in (("dense", 0.0), ("uniform rtn:bits=3", 0.6123), ("searched", 0.4617)):
    ROWS[name] |= {"kl_nats": loss, "top1_agreement": 0.7, "window": 2048, "n_tokens": 20480}


def plan(**about: Any) -> Plan:
    levels = {f"model.layers.{i}.mlp.up_proj": f"rtn:bits={3 + i},group_size=32" for i in range(2)}
    return Plan(levels, dict.fromkeys(levels, (64, 64)), base_model=BASE, **about)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.zeros(10, dtype=torch.uint8)}, folder / "model.safetensors")
    return folder


def card(folder: Path, plan: Plan, recipe: Recipe | None = None) -> str:
    return write_card(folder, plan, recipe, name="me/small").read_text(encoding="utf-8")


def test_the_front_matter_is_what_the_hub_accepts(folder: Path) -> None:
    text = card(folder, plan())
    assert card_errors(text) == []
    metadata = parse(text)
    assert metadata["base_model"] == BASE
    assert metadata["base_model_relation"] == "quantized"
    assert {"evopress", "evopress-plan"} <= set(metadata["tags"])


def test_a_local_base_model_is_not_told_to_the_hub(folder: Path, tmp_path: Path) -> None:
    text = card(folder, plan().replace(base_model=str(tmp_path / "dense")))
    assert "base_model" not in parse(text)
    assert str(tmp_path) not in text


def test_the_first_code_says_what_to_install_before_it_loads(folder: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", card(folder, plan()), re.DOTALL)
    assert code[0].startswith("# pip install hf-evopress\nfrom transformers import")
    for block in code:
        compile(block, "card", "exec")


def test_measured_rows_are_in_the_table_with_their_protocol(folder: Path) -> None:
    text = card(folder, plan(results={"evaluation": ROWS, "text": "wiki.test.raw"}))
    assert "| this model | 3.290 | 100 MB | 26.70 | 0.4617 | 70.0% |" in text
    assert "On 20,480 tokens in non-overlapping windows of 2,048 of wiki.test.raw." in text


def test_a_finished_plan_says_what_finishing_gave(folder: Path) -> None:
    notes = {"mode": "best", "before": 0.4237, "after": 0.3906, "is_kept": True}
    text = card(folder, plan(results={"refined": notes}))
    assert "mode best), at the same bytes: loss 0.4237\n  before, 0.3906 after" in text
    assert "not kept" not in text
    assert "so not kept" in card(folder, plan(results={"refined": {**notes, "is_kept": False}}))
    both = {"refined": notes, "distilled": {**notes, "mode": "end-to-end"}}
    text = card(folder, plan(results=both))
    assert "mode best)" in text and "mode end-to-end)" in text
    assert "wrote itself" not in text
    text = card(folder, plan(results={"refined": {**notes, "written": 128}}))
    assert "among those it did are 128 that the dense model wrote itself" in text
    odd = {**notes, "mode": "<script>"}
    assert "script" not in card(folder, plan(results={"refined": odd}))


def test_what_was_not_measured_is_left_out(folder: Path) -> None:
    some = {name: {"perplexity": row["perplexity"]} for name, row in ROWS.items()}
    text = card(folder, plan(results={"evaluation": some}))
    assert "| perplexity |" in text and "KL to dense" not in text and "windows" not in text
    text = card(folder, plan())
    assert "## Measured" not in text and "Nothing was measured" in text


def test_every_number_of_the_table_is_in_the_plan(folder: Path) -> None:
    made = plan(results={"evaluation": ROWS})
    table = card(folder, made).partition("## Measured")[2].partition("##")[0]
    known = [v for row in ROWS.values() for v in row.values()]
    for number in re.findall(r"(?<![\w=.])\d+\.\d+(?!\w)", table):
        places = len(number.partition(".")[2])
        near = [k for k in known if abs(round(k, places) - float(number)) < 1e-9]
        assert near or abs(float(number) - 70.0) < 1e-9, number


def test_the_heat_map_lies_beside_the_card(folder: Path) -> None:
    text = card(folder, plan())
    assert "](evopress_plan.png)" in text
    assert (folder / "evopress_plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_with_a_history_has_its_curve(folder: Path) -> None:
    history = [{"generation": i, "loss": 0.5 / (i + 1)} for i in range(3)]
    assert "](evopress_search.png)" in card(folder, plan(search={"history": history}))
    assert (folder / "evopress_search.png").is_file()


def test_paired_differences_of_the_search_are_told_with_their_error(folder: Path) -> None:
    against = {"uniform rtn": {"difference": -0.1234, "stderr": 0.0101, "sequences": 16}}
    text = card(folder, plan(search={"against": against}))
    assert "-0.1234 ± 0.0101 nats" in text and "16 sequences" in text


def test_the_recipe_in_the_card_makes_the_same_model(folder: Path) -> None:
    recipe = Recipe.from_dict(
        {"model": BASE, "budget": {"bits": 3.3}, "out": "mine/x", "work": "mine/w"}
    )
    text = card(folder, plan(), recipe)
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    again = Recipe.from_dict(yaml.safe_load(block[1]))
    assert again.to_dict() | {"out": "mine/x", "work": "mine/w"} == recipe.to_dict()
    assert "mine/" not in text


def test_the_same_plan_gives_the_same_card(folder: Path) -> None:
    assert card(folder, plan()) == card(folder, plan())


def test_a_card_of_ones_own_is_known(folder: Path) -> None:
    assert is_ours(folder / "README.md")
    card(folder, plan())
    assert is_ours(folder / "README.md")
    (folder / "README.md").write_text("# my own words")
    assert not is_ours(folder / "README.md")


def test_a_card_explains_the_tensors_that_there_are(folder: Path) -> None:
    def told(*levels: str) -> str:
        units = {f"model.layers.{i}.mlp.up_proj": level for i, level in enumerate(levels)}
        text = card(folder, Plan(units, dict.fromkeys(units, (64, 64)), base_model=BASE))
        return " ".join(text.partition("A layer `L`")[2].partition("`config.json`")[0].split())

    walks = told("trellis:bits=2.5,scales=channels")
    assert "walks through a trellis" in walks and "zeros" not in walks
    both = told("rtn:bits=3,group_size=32 + lowrank:rank=4", "trellis:bits=3")
    assert "`L.zeros`" in both and "; or `L.codes` (walks" in both and "; factors `L.A`" in both
    assert told("magnitude:sparsity=0.5") == "stores the tensors that its level names."
    assert told("lowrank:rank=4").startswith("stores factors `L.A`")


def test_a_card_says_whether_embedding_and_head_are_packed(folder: Path) -> None:
    assert "not compressed: embeddings, output head, norms" in card(folder, plan())
    levels = {**plan().levels, "model.embed_tokens": "rtn:bits=8,group_size=32"}
    text = card(folder, Plan(levels, dict.fromkeys(levels, (64, 64)), base_model=BASE))
    assert (
        "not compressed: norms, biases, headers, and embedding" in text
        and "those of the decoder; embedding" in text
    )


def test_bits_count_scales_and_zero_points() -> None:
    bits = exact_bits(plan())
    assert bits == {
        "model.layers.0.mlp.up_proj": 3 + (16 + 3) / 32,
        "model.layers.1.mlp.up_proj": 4 + (16 + 4) / 32,
    }


def test_an_adapter_has_a_card_from_its_own_files(tmp_path: Path) -> None:
    tensors = {}
    for i, rank in enumerate((4, 8)):
        key = f"base_model.model.model.layers.{i}.mlp.up_proj"
        tensors[f"{key}.lora_A.weight"] = torch.zeros(rank, 64)
        tensors[f"{key}.lora_B.weight"] = torch.zeros(32, rank)
    about = {"hf_evopress": json.dumps({"kind": "eora", "kl_nats": 0.31234567})}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata=about)
    config = {"base_model_name_or_path": "me/small", "peft_type": "LORA", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    text = write_card(tmp_path, name="me/small-eora").read_text(encoding="utf-8")
    assert card_errors(text) == []
    assert parse(text)["base_model_relation"] == "adapter"
    assert "| layers | 2 |" in text and "| rank | 4 to 8 |" in text
    assert "| kind | eora |" in text and "| kl nats | 0.3123 |" in text
    assert f"| parameters | {12 * (64 + 32):,} |" in text


def test_text_from_a_plan_cannot_leave_its_table_cell(folder: Path) -> None:
    rows = {"x |\n# heading <script>": {"perplexity": 2.0}}
    text = card(folder, plan(results={"evaluation": rows}))
    assert "<script>" not in text and "\n# heading" not in text
    assert cell("a|b`c") == r"a\|b\`c"


def test_a_plan_card_lists_the_front(tmp_path: Path) -> None:
    plans = {f"plan-{b}.json": plan(budget={"bits_per_weight": b}).to_dict() for b in (2.8, 3.3)}
    index = {name: entry_of(name, made) for name, made in plans.items()}
    text = plan_card("me/front", plans, index)
    assert card_errors(text) == []
    assert "| `plan-2.8.json` | 2.800 |" in text
    assert 'from_pretrained("me/front", filename="plan-2.8.json")' in text


@pytest.mark.parametrize(
    "name, known", [(BASE, BASE), ("/tmp/x", None), ("..", None), (None, None)]
)
def test_only_a_name_on_the_hub_is_a_base(name: str | None, known: str | None) -> None:
    assert hub_base(name) == known


def test_an_unknown_relation_is_refused() -> None:
    with pytest.raises(ValueError, match="base_model_relation is one of adapter"):
        front_matter({"base_model_relation": "cousin"})


def test_a_header_of_impossible_length_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensor_shapes(folder)


@pytest.mark.parametrize("level", [x for m in compose.methods() for x in m.examples])
def test_a_plan_card_asks_for_data_where_a_level_needs_it(level: str) -> None:
    unit = "model.layers.0.mlp.up_proj"
    text = plan_card("me/plan", {FILE_NAME: Plan({unit: level}).to_dict()}, {})
    assert "data=" in text or not compose.needs_stats(compose.normalize(level))


def test_a_plan_card_asks_for_no_data_where_none_is_needed() -> None:
    plan = Plan({"model.layers.0.mlp.up_proj": "rtn:bits=4,group_size=64"})
    assert "data=" not in plan_card("me/plan", {FILE_NAME: plan.to_dict()}, {})


def test_a_card_says_whether_a_search_a_plan_or_a_stack_made_the_model(folder: Path) -> None:
    recipe = Recipe.from_dict({"model": "me/tiny", "budget": {"bits": 4}})
    searched = card(folder, plan(search={"strategy": "evolve"}), recipe)
    assert "a search gave each layer" in searched and "hf-evopress run recipe.yaml" in searched
    assert "each layer has the level that a plan gives it" in card(folder, plan(), recipe)
    blocks = Plan({"model.layers.0.mlp.up_proj": "bitstack:blocks=2,rank=1"})
    made = card(folder, with_order(blocks, ["model.layers.0.mlp.up_proj"] * 2), recipe)
    assert "hf-evopress resize me/small" in made and "hf-evopress stack" in made
    assert "a search" not in made and "hf-evopress run" not in made
