"""Models and adapters through the real client and a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress import Plan
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.models.units import find_units
from hf_evopress.sharing.cards import write_card
from hf_evopress.sharing.hub import check_folder, pull, push_folder

from ..hub_server import Hub

LEVELS = ("rtn:bits=4,group_size=32", "rtn:bits=3,group_size=32")
IDS = [[5, 6, 7, 8, 9, 10]]


def plan_of(model: nn.Module) -> Plan:
    units = find_units(model)
    levels = {unit.name: LEVELS[i % 2] for i, unit in enumerate(units)}
    return Plan(levels, {unit.name: unit.shape for unit in units}, base_model="me/tiny")


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed tiny model in shards, with plan, recipe and card."""
    import hf_evopress  # noqa: F401 - registers the format

    root = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(root / "dense")
    plan = plan_of(model)
    compressed = AutoModelForCausalLM.from_pretrained(
        root / "dense", quantization_config=EvoPressConfig(plan)
    )
    compressed.save_pretrained(root / "small", max_shard_size="40KB")
    compressed.config.quantization_config.plan.save(root / "small")
    (root / "small" / "evopress_recipe.yaml").write_text("model: me/tiny\nbudget: {bits: 4}\n")
    write_card(root / "small", name="me/small")
    return root / "small"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits


def test_a_model_is_pushed_with_everything_in_one_commit(hub: Hub, folder: Path) -> None:
    info = push_folder(folder, "me/small", commit_message="all of it")
    assert hub.repos["me/small"].messages == ["initial", "all of it"]
    pushed = hub.files("me/small", info.oid)
    for path in folder.rglob("*"):
        assert pushed[path.relative_to(folder).as_posix()] == path.read_bytes()
    assert sum(name.endswith(".safetensors") for name in pushed) > 2
    assert {"README.md", "evopress_plan.json", "evopress_recipe.yaml"} <= set(pushed)


def test_a_pulled_model_is_the_pushed_one(hub: Hub, folder: Path, tmp_path: Path) -> None:
    info = push_folder(folder, "me/small")
    HfApi().create_tag("me/small", tag="v1")
    for revision in ("main", "v1", info.oid):
        got = pull("me/small", tmp_path / revision, revision=revision)
        assert check_folder(got) == check_folder(folder)
        assert all((got / n).read_bytes() == (folder / n).read_bytes() for n in check_folder(got))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_fresh_process_loads_the_model_from_the_hub(hub: Hub, folder: Path) -> None:
    oid = push_folder(folder, "me/small").oid
    push_folder(folder, "me/small", revision="other")
    code = f"""
import json, torch, hf_evopress
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/small", revision={oid!r})
assert model.config.quantization_config.quant_method == "evopress"
assert hf_evopress.Plan.from_pretrained("me/small", revision={oid!r}) == \\
    model.config.quantization_config.plan
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor({IDS})).logits.tolist()))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_push_to_hub_of_a_loaded_model_carries_its_plan(hub: Hub, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.push_to_hub("me/again", max_shard_size="40KB")
    names = set(hub.files("me/again"))
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert Plan.from_pretrained("me/again") == model.config.quantization_config.plan


def test_a_shared_plan_compresses_a_relative(
    hub: Hub, folder: Path, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    tiny_model(seed=1).save_pretrained(tmp_path)
    relative = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=EvoPressConfig(plan="me/small")
    )
    own, shared = relative.config.quantization_config.plan, Plan.load(folder)
    assert own == shared.replace(base_model=str(tmp_path))  # the model that it is of


def test_a_plan_for_other_widths_or_another_depth_is_refused(
    hub: Hub, folder: Path, tiny_model: Callable[..., nn.Module], tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    tiny_model(intermediate_size=96).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="does not fit this model") as caught:
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "wide", quantization_config=EvoPressConfig(plan="me/small")
        )
    assert "model.layers.1.mlp.down_proj: the model has 64x96" in str(caught.value)
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: not in the model"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "short", quantization_config=EvoPressConfig(plan="me/small")
        )
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match="it ends with block 1, the model also has 2, 3"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "deep", quantization_config=EvoPressConfig(plan="me/small")
        )


def test_a_smaller_model_pushed_later_leaves_no_stale_shards(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "one")
    push_folder(tmp_path / "one", "me/small")
    shards = {name for name in hub.files("me/small") if "safetensors" in name}
    assert shards == {"model.safetensors"}


def test_an_adapter_goes_to_its_own_repository_or_a_subfolder(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    push_folder(folder, "me/small")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    nn.init.normal_(next(p for n, p in adapter.named_parameters() if "lora_B" in n))
    adapter.peft_config["default"].base_model_name_or_path = "me/small"
    adapter.save_pretrained(tmp_path / "eora", save_embedding_layers=False)
    write_card(tmp_path / "eora", name="me/small-eora")
    push_folder(tmp_path / "eora", "me/small-eora")
    push_folder(tmp_path / "eora", "me/small", subfolder="eora")
    assert hub.repos["me/small-eora"].labels.count("base_model:adapter:me/small") == 1
    assert "eora/adapter_model.safetensors" in hub.files("me/small")
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, pull("me/small-eora", tmp_path / "back"))
    assert torch.equal(logits(loaded), logits(adapter.eval()))


def test_a_folder_of_plans_becomes_a_plan_repository(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    plan = Plan.load(folder)
    plan.save(tmp_path / "plan-a.json")
    plan.replace(budget={"bits_per_weight": 2.0}).save(tmp_path / "plan-b.json")
    push_folder(tmp_path, "me/plans")
    assert Plan.from_pretrained("me/plans", filename="plan-a.json") == plan
    assert "config.json" not in hub.files("me/plans")


# -- what goes wrong ---------------------------------------------------------------------------


def test_an_interrupted_upload_commits_nothing_and_can_be_repeated(hub: Hub, folder: Path) -> None:
    hub.hang_up("PUT /lfs/", times=99)
    with pytest.raises(OSError, match="nothing was committed, run it again"):
        push_folder(folder, "me/small")
    assert set(hub.files("me/small")) == {".gitattributes"}
    hub.faults.clear()
    push_folder(folder, "me/small")
    assert "config.json" in hub.files("me/small")


def test_what_a_killed_push_left_in_the_folder_is_not_pushed(hub: Hub, folder: Path) -> None:
    code = "import os; from hf_evopress.base.resources import atomic_path\n"
    code += f"with atomic_path({str(folder / 'evopress_search.png')!r}): os._exit(9)"
    subprocess.run([sys.executable, "-c", code], check=False)
    left = [*folder.glob(".evopress_search.png.*")]
    push_folder(folder, "me/small")
    assert len(left) == 1 and not left[0].exists()
    assert not any(name.startswith(".evopress") for name in hub.files("me/small"))


def test_an_interrupted_download_leaves_no_folder_and_goes_on(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    hub.hang_up("GET .*resolve.*00002-of", times=99)
    with pytest.raises(OSError, match="me/small"):
        pull("me/small", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    hub.faults.clear()
    hub.requests.clear()
    pull("me/small", tmp_path / "got")
    assert not any(r.startswith("GET") and "00001-of" in r for r in hub.requests)


def test_a_truncated_or_changed_download_is_not_used(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    hub.truncate("GET .*resolve.*00001-of", 100, times=99)
    with pytest.raises(OSError, match="me/small|Consistency"):
        pull("me/small", tmp_path / "got")
    hub.faults.clear()
    hub.corrupt("00001-of")
    with pytest.raises(OSError, match="checksum that the Hub states; it was removed"):
        pull("me/small", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    hub.corrupt(None)
    assert check_folder(pull("me/small", tmp_path / "got")) == check_folder(folder)


def test_a_missing_revision_and_a_wrong_token_are_named(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    push_folder(folder, "me/small")
    with pytest.raises(FileNotFoundError, match="me/small has no revision 'v9'"):
        pull("me/small", tmp_path / "got", revision="v9")
    with pytest.raises(PermissionError, match="refuses this token"):
        push_folder(folder, "me/small", token="hf_wrong")


def test_a_rate_limit_is_waited_for(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.fail("POST .*/(create|commit|preupload|branch)", 429, times=3, Retry_After="1")
    push_folder(folder, "me/small", revision="dev")
    hub.fail("GET .*/(tree|revision)", 429, times=2)
    hub.fail("(HEAD|GET) .*resolve", 429, times=2)
    assert check_folder(pull("me/small", tmp_path / "got", revision="dev")) == check_folder(folder)


def test_a_folder_of_other_files_is_not_overwritten(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="thesis.txt.*--overwrite"):
        pull("me/small", tmp_path)


def test_a_card_that_the_hub_would_refuse_stops_the_push(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nbase_model_relation: cousin\n---\n")
    with pytest.raises(ValueError, match="base_model_relation"):
        push_folder(tmp_path / "m", "me/small")
    assert "config.json" not in hub.files("me/small")


def test_an_empty_repository_is_said_to_be_empty(hub: Hub, tmp_path: Path) -> None:
    HfApi(endpoint=hub.url, token=hub.token).create_repo("me/new")
    with pytest.raises(FileNotFoundError, match="me/new at .* is empty"):
        pull("me/new", tmp_path / "got")
