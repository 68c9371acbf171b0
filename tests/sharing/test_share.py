"""The commands that share: push, pull, plans, card, report, import, export-config, show, diff."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_evopress import Plan
from hf_evopress.cli import main

from ..hub_server import Hub, front_matter

BASE = "HuggingFaceTB/SmolLM2-135M"
UNIT = "model.layers.0.mlp.up_proj"


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return int(end.value.code or 0)


def plan(bits: int = 3) -> Plan:
    return Plan(
        {UNIT: f"rtn:bits={bits},group_size=32"},
        {UNIT: (64, 64)},
        BASE,
        "a" * 40,
        budget={"bits_per_weight": bits + 0.6},
    )


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    return plan().save(tmp_path / "plan.json")


def test_a_plan_is_pushed_found_shown_and_compared(
    hub: Hub, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", str(plan_file), "me/plan", "-m", "first") == 0
    assert hub.repos["me/plan"].messages[-1] == "first"
    assert run("plans", BASE) == 0
    assert "me/plan" in (out := capsys.readouterr().out) and "3.600" in out
    assert run("show", "me/plan") == 0
    assert f"plan for {BASE}: 1 units" in capsys.readouterr().out
    other = plan(4).save(plan_file.with_name("other.json"))
    assert run("diff", "me/plan@main", str(other)) == 1
    assert "1 units differ" in capsys.readouterr().out
    assert run("diff", "me/plan", str(plan_file)) == 0


def test_no_plans_for_a_model_is_said(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plans", BASE) == 0
    assert f"no plans for {BASE}" in capsys.readouterr().out


def test_one_bad_repository_does_not_hide_the_others(
    hub: Hub, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("push", str(plan_file), "me/good")
    card = hub.files("me/good")["README.md"]
    hub.put("me/bad", {"README.md": card, "evopress_plans.json": b"[" * 100_000})
    assert run("plans", BASE) == 0
    out = capsys.readouterr().out
    assert "me/good" in out and "me/bad" in out and "not readable" in out


def test_plans_of_model_repositories_are_listed_with_their_figures(
    hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    card = f"---\nbase_model: {BASE}\ntags: [evopress-plan]\n---\n".encode()
    hub.put("me/model", {"README.md": card, "evopress_plan.json": plan(3).to_json().encode()})
    settings = {"quant_method": "evopress", "plan": json.loads(plan(4).to_json())}
    config = json.dumps({"quantization_config": settings}).encode()
    hub.put("me/bare", {"README.md": card, "config.json": config})
    assert run("plans", BASE) == 0
    out = capsys.readouterr().out
    assert "evopress_plan.json" in out and "3.600" in out
    assert "config.json" in out and "4.600" in out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({f"{UNIT}.codes": torch.zeros(4, dtype=torch.uint8)}, folder / "model.safetensors")
    plan().save(folder)
    return folder


def test_a_model_is_pushed_with_a_card_that_names_its_repository(hub: Hub, model: Path) -> None:
    assert run("push", str(model), "me/small", "--private") == 0
    assert hub.repos["me/small"].private
    card = hub.files("me/small")["README.md"].decode()
    assert 'from_pretrained("me/small")' in card
    assert front_matter(card)["base_model"] == BASE
    assert "evopress_plan.png" in hub.files("me/small")


def test_ones_own_card_is_pushed_as_it_is(hub: Hub, model: Path) -> None:
    (model / "README.md").write_text("# my own words\n")
    assert run("push", str(model), "me/small") == 0
    assert hub.files("me/small")["README.md"] == b"# my own words\n"


def test_a_model_is_pulled(hub: Hub, model: Path, tmp_path: Path) -> None:
    run("push", str(model), "me/small")
    assert run("pull", "me/small", str(tmp_path / "got")) == 0
    assert Plan.load(tmp_path / "got") == plan()


def test_card_and_report_are_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("card", str(model)) == 0
    assert 'from_pretrained("small")' in (model / "README.md").read_text()
    assert run("report", str(model)) == 0
    assert (tmp_path / "small.report.html").is_file()


def test_a_configuration_goes_in_and_out_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"{UNIT}: 3\nmodel.layers.0.mlp.down_proj: 2"
    source, made, back = (tmp_path / n for n in ("m_3bit.txt", "plan.json", "back.txt"))
    source.write_text(text)
    assert run("import", str(source), "--out", str(made)) == 0
    assert "not checked: give --model" in capsys.readouterr().out
    assert str(Plan.load(made)[UNIT]) == "gptq:bits=3,group_size=128"
    assert run("export-config", str(made), str(back)) == 0
    assert back.read_text() == text


def test_a_folder_of_configurations_becomes_a_folder_of_plans(tmp_path: Path) -> None:
    (tmp_path / "in" / "drop").mkdir(parents=True)
    (tmp_path / "in" / "m_3bit.txt").write_text(f"{UNIT}: 3")
    (tmp_path / "in" / "drop" / "config.txt").write_text("none\nattn\n")
    assert run("import", str(tmp_path / "in"), "--out", str(tmp_path / "out")) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"m_3bit.json", "drop-config.json"}


def test_bad_input_ends_with_code_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_text("garbage")
    assert run("import", str(tmp_path / "x.txt"), "--out", str(tmp_path / "p.json")) == 2
    assert "line 1: 'garbage' is not" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "p.json").exists()
