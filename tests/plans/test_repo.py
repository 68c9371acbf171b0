"""Plans on the Hub: the real client against a hub on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from hf_evopress import Plan
from hf_evopress.plans.repo import find_repos, list_plans, read_index

from ..hub_server import Hub, front_matter

BASE = "HuggingFaceTB/SmolLM2-135M"


def plan(bits: float = 3.3, kl: float | None = 0.42) -> Plan:
    row: dict[str, Any] = {"bits_per_weight": bits, "window": 64, "n_tokens": 128}
    row |= {} if kl is None else {"kl_nats": kl}
    return Plan(
        {"model.layers.0.mlp.up_proj": "gptq:bits=3,group_size=64"},
        shapes={"model.layers.0.mlp.up_proj": (128, 64)},
        base_model=BASE,
        revision="a" * 40,
        budget={"asked": f"{bits} bits per weight"},
        results={"evaluation": {"searched": row}},
    )


def test_a_pushed_plan_comes_back_equal(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    assert Plan.from_pretrained("me/plan") == plan()


def test_a_push_is_one_commit_with_plan_index_and_card(hub: Hub) -> None:
    info = plan().push_to_hub("me/plan", commit_message="a plan")
    assert hub.repos["me/plan"].messages == ["initial", "a plan"]
    files = set(hub.files("me/plan", info.oid))
    assert {"evopress_plan.json", "evopress_plans.json", "README.md"} <= files


def test_a_plan_is_found_by_branch_tag_and_commit(hub: Hub) -> None:
    first = plan(3.3).push_to_hub("me/plan")
    HfApi().create_tag("me/plan", tag="v1")
    plan(2.8).push_to_hub("me/plan")
    plan(4.3).push_to_hub("me/plan", revision="dense-ish")
    assert Plan.from_pretrained("me/plan@v1") == plan(3.3)
    assert Plan.from_pretrained("me/plan", revision=first.oid) == plan(3.3)
    assert Plan.from_pretrained("me/plan") == plan(2.8)
    assert Plan.from_pretrained("me/plan@dense-ish") == plan(4.3)


def test_several_plans_share_a_repository_and_its_index(hub: Hub) -> None:
    plan(3.3, 0.4).push_to_hub("me/front")
    plan(2.8, 0.9).push_to_hub("me/front", filename="plan-2.8bit.json")
    entries = list_plans("me/front")
    assert list(entries) == ["plan-2.8bit.json", "evopress_plan.json"]
    assert entries["plan-2.8bit.json"].kl_nats == 0.9
    assert Plan.from_pretrained("me/front", filename="plan-2.8bit.json") == plan(2.8, 0.9)
    assert Plan.from_pretrained("me/front") == plan(3.3, 0.4)


def test_an_older_repository_without_an_index_gets_its_plan_into_the_new_one(hub: Hub) -> None:
    hub.put("me/front", {"evopress_plan.json": plan(3.3).to_json().encode()})
    plan(2.8).push_to_hub("me/front", filename="plan-2.8bit.json")
    assert set(list_plans("me/front")) == {"evopress_plan.json", "plan-2.8bit.json"}


def test_several_plans_without_a_main_one_have_to_be_named(hub: Hub) -> None:
    plan(2.8).push_to_hub("me/front", filename="a.json")
    assert Plan.from_pretrained("me/front") == plan(2.8)
    plan(3.3).push_to_hub("me/front", filename="b.json")
    with pytest.raises(ValueError, match=r"holds 2 plans; name one .*: a.json, b.json"):
        Plan.from_pretrained("me/front")


def test_two_who_push_at_once_do_not_lose_a_plan(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    moved = []

    def other(handler: Any) -> bool:
        if not moved:
            moved.append(hub.put("me/plan", hub.files("me/plan"), "someone else"))
        return False

    hub._fault("POST .*/preupload", other, 1)
    with pytest.raises(OSError, match="changed by someone else meanwhile"):
        plan(2.8).push_to_hub("me/plan")


def test_a_private_plan_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan().push_to_hub("me/secret", private=True)
    assert hub.repos["me/secret"].private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="or it is private: log in"):
        Plan.from_pretrained("me/secret")


def test_a_pull_request_leaves_the_branch_alone(hub: Hub) -> None:
    plan(3.3).push_to_hub("me/plan")
    info = plan(2.8).push_to_hub("me/plan", create_pr=True)
    assert "discussions" in info.pr_url
    assert Plan.from_pretrained("me/plan") == plan(3.3)


def test_the_card_makes_the_plan_findable_by_its_base(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    plan().replace(base_model="other/model").push_to_hub("me/other")
    card = front_matter(hub.files("me/plan")["README.md"].decode())
    assert card["base_model"] == BASE and "evopress-plan" in card["tags"]
    assert find_repos(BASE) == ["me/plan"]


def test_a_model_repository_keeps_its_own_card(hub: Hub) -> None:
    hub.put("me/model", {"config.json": b"{}", "README.md": b"# mine\n"})
    plan().push_to_hub("me/model")
    assert hub.files("me/model")["README.md"] == b"# mine\n"


def test_a_plan_is_found_in_the_config_of_a_compressed_model(tmp_path: Path) -> None:
    settings = {"quant_method": "evopress", "plan": json.loads(plan().to_json())}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    assert Plan.from_pretrained(tmp_path) == plan()


def test_a_plan_that_pins_no_commit_is_warned_about(
    hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    plan().replace(revision="main").push_to_hub("me/plan")
    assert "does not pin its base model" in caplog.text


# -- what goes wrong ---------------------------------------------------------------------------


def test_a_missing_revision_is_named(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    with pytest.raises(FileNotFoundError, match="no revision 'v9'; give a branch, a tag"):
        Plan.from_pretrained("me/plan@v9")


def test_a_missing_repository_is_named(hub: Hub) -> None:
    with pytest.raises(FileNotFoundError, match="there is no me/nothing on the Hub"):
        Plan.from_pretrained("me/nothing")


def test_a_repository_without_a_plan_says_what_was_looked_for(hub: Hub) -> None:
    hub.put("me/model", {"config.json": b"{}"})
    with pytest.raises(FileNotFoundError, match="no plan at me/model: neither evopress_plan"):
        Plan.from_pretrained("me/model")


def test_a_wrong_token_is_said_to_be_wrong(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    with pytest.raises(PermissionError, match="refuses this token"):
        Plan.from_pretrained("me/plan", token="hf_wrong")
    with pytest.raises(PermissionError, match="refuses this token"):
        plan().push_to_hub("me/plan", token="hf_wrong")


def test_a_rate_limit_is_waited_for(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    hub.fail("POST .*paths-info", 429, times=2)
    hub.fail("(HEAD|GET) .*resolve", 429, times=2)
    assert Plan.from_pretrained("me/plan") == plan()


def test_a_lasting_rate_limit_ends_in_a_clear_error(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    hub.fail("(HEAD|GET|POST) ", 429, times=99, Retry_After="7")
    with pytest.raises(OSError, match=r"limits the rate .* try again in 7 seconds"):
        Plan.from_pretrained("me/plan")


def test_a_truncated_download_is_not_taken_for_a_plan(hub: Hub) -> None:
    plan().push_to_hub("me/plan")
    hub.truncate("GET .*resolve", 40, times=99)
    with pytest.raises(OSError, match="me/plan"):
        Plan.from_pretrained("me/plan")
    hub.faults.clear()
    assert Plan.from_pretrained("me/plan") == plan()


def test_an_interrupted_push_leaves_the_old_plan(hub: Hub) -> None:
    plan(3.3).push_to_hub("me/plan")
    hub.hang_up("POST .*/commit/", times=99)
    with pytest.raises(OSError, match="did not answer about me/plan"):
        plan(2.8).push_to_hub("me/plan")
    hub.faults.clear()
    assert Plan.from_pretrained("me/plan") == plan(3.3)


def test_without_a_connection_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan().push_to_hub("me/plan")
    Plan.from_pretrained("me/plan")
    hub.hang_up(".", times=999)
    assert Plan.from_pretrained("me/plan") == plan()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not valid JSON"),
        ("[]", "no list 'plans'"),
        ('{"format_version": 9, "plans": []}', "format_version 9"),
        ('{"format_version": 1, "plans": [{"file": "../a.json"}]}', "plain file name"),
        ('{"format_version": 1, "plans": [{"file": "a.json", "bit": 3}]}', "unknown key 'bit'"),
        ('{"format_version": 1, "plans": [{"file": "a.json", "kl_nats": "x"}]}', "is a number"),
        ('{"format_version": 1, "plans": [{"file": "a.json"}, {"file": "a.json"}]}', "twice"),
    ],
)
def test_a_bad_index_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_index(text)


def test_a_plan_is_renamed_for_another_module_tree() -> None:
    renamed = plan().rename({r"^model\.": "model.language_model.", "up_proj": "fc1"})
    assert list(renamed) == ["model.language_model.layers.0.mlp.fc1"]
    assert list(renamed.shapes) == list(renamed)
    with pytest.raises(ValueError, match="matches none of the 1 units"):
        plan().rename({"decoder": "x"})


def test_a_renaming_that_merges_units_is_refused() -> None:
    two = Plan({"layers.0.a": "rtn:bits=4,group_size=32", "layers.0.b": "dense"})
    with pytest.raises(ValueError, match="several units one name: layers.0.c"):
        two.rename({"[ab]$": "c"})
