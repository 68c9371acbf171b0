"""adapt, tune and merge from folder to folder, and on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.folder import load_adapter, read_adapter
from hf_evopress.adapters.repair import adapt, merge
from hf_evopress.cli import main
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.methods import compose
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.distillation import Targets
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune


@pytest.fixture(scope="module")
def place(
    trained_llama: Any, structured_text: Any, write_model: Any, tmp_path_factory: Any
) -> Path:
    """A folder with text.txt, the model dense/ and its compressed checkpoint small/."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text(structured_text(600))
    (folder / "test.txt").write_text(structured_text(30, seed=5))
    return write_model(folder, trained_llama, "rtn:bits=3,group_size=32,clip=false")


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


QUICK: dict[str, Any] = {
    "steps": 4, "batch": 2, "seq_len": 32, "sequences": 16, "rank": 2, "save_steps": 2,
}  # fmt: skip


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_adapt_shares_out_a_size_by_what_errors_cost(there: Path, tmp_path: Path) -> None:
    out = adapt(
        "small", tmp_path, data=["text.txt"], dense="dense", size="25kB",
        n_sequences=8, seq_len=48, sensitivity_tokens=192,
    )  # fmt: skip
    assert (out / "adapter_model.safetensors").stat().st_size <= 25_000
    assert len(set(read_adapter(out).ranks.values())) > 1
    assert read_adapter(out).config["base_model_name_or_path"] == "small"


def test_adapt_needs_a_dense_model_that_is_there(there: Path, tmp_path: Path) -> None:
    settings = json.loads((there / "small/config.json").read_text())
    with pytest.raises(ValueError, match="does not say which model.*--dense"):
        adapt("dense", tmp_path, data=["text.txt"], rank=2)
    assert settings["quantization_config"]["plan"]["base_model"] == "me/dense"
    with pytest.raises(ValueError, match="small is small, which is read"):
        adapt("small", "small", data=["text.txt"], dense="dense", rank=2)


def test_an_adapter_trains_from_eora_and_beside_it(there: Path, tmp_path: Path) -> None:
    eora = adapt(
        "small", tmp_path / "eora", data=["text.txt"], dense="dense", rank=2,
        n_sequences=4, seq_len=32,
    )  # fmt: skip
    started = tune("small", tmp_path / "on", Tuning(**QUICK, start=str(eora)), data=["text.txt"])
    beside = tune("small", tmp_path / "by", Tuning(**QUICK, beside=str(eora)), data=["text.txt"])
    assert len(started.losses) == len(beside.losses) == 4
    before, after = read_adapter(eora), read_adapter(started.folder)
    assert before.ranks == after.ranks
    name = next(iter(before.ranks))
    assert not torch.equal(before.factors[name][1].float(), after.factors[name][1].float())
    assert (beside.folder / "adapter_config.json").is_file()
    assert not (beside.folder / "beside").exists()


def test_condition_numbers_are_kept_beside_the_plan(there: Path, tmp_path: Path) -> None:
    settings = Tuning(**{**QUICK, "target": "kappa:0.2"})
    tune("small", tmp_path / "lora", settings, data=["text.txt"])
    kept = json.loads((there / "small" / "kappa.json").read_text())["kappa"]
    smallest = sorted(kept, key=kept.__getitem__)[: len(kept) // 5]
    assert sorted(read_adapter(tmp_path / "lora").ranks) == sorted(smallest)


def test_a_model_and_an_adapter_in_one_folder_are_refused(there: Path, tmp_path: Path) -> None:
    shutil.copytree(there / "small", tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="both holds a model and an adapter.*of their own"):
        adapt(str(tmp_path / "both"), tmp_path / "out", data=["text.txt"], dense="dense", rank=2)


def test_merging_into_a_model_without_a_plan_is_refused(there: Path, tmp_path: Path) -> None:
    adapt("small", tmp_path / "a", data=["text.txt"], dense="dense", rank=2, n_sequences=2,
          seq_len=32)  # fmt: skip
    with pytest.raises(ValueError, match="dense has no plan.*merge_and_unload"):
        merge("dense", str(tmp_path / "a"), tmp_path / "out")


def test_a_stopped_run_goes_on_and_ends_where_a_straight_one_does(
    there: Path, tmp_path: Path
) -> None:
    straight = tune("small", tmp_path / "a", Tuning(**QUICK), data=["text.txt"])
    # what a run leaves that was stopped after its last checkpoint
    tune("small", tmp_path / "b", Tuning(**QUICK), data=["text.txt"])
    for file in (tmp_path / "b").iterdir():
        file.unlink()
    resumed = tune("small", tmp_path / "b", Tuning(**QUICK), data=["text.txt"])
    one, two = read_adapter(straight.folder), read_adapter(resumed.folder)
    assert all(torch.equal(pair[1], two.factors[n][1]) for n, pair in one.factors.items())
    with pytest.raises(ValueError, match="other rank"):
        tune("small", tmp_path / "b", Tuning(**{**QUICK, "rank": 3}), data=["text.txt"])


def test_healing_saves_an_ordinary_checkpoint_with_the_same_plan(
    there: Path, tmp_path: Path
) -> None:
    settings = Tuning(**{**QUICK, "steps": 20}, train="scales,norms", teacher="dense")
    healed = tune("small", tmp_path / "healed", settings, data=["text.txt"])
    model = AutoModelForCausalLM.from_pretrained(healed.folder)
    old = AutoModelForCausalLM.from_pretrained("small")
    assert Plan.load(healed.folder).levels == old.hf_quantizer.quantization_config.plan.levels
    before, after = compressed_linears(old), compressed_linears(model)
    assert all(torch.equal(m.codes, after[n].codes) for n, m in before.items())
    assert any(not torch.equal(m.scales, after[n].scales) for n, m in before.items())
    sizes = [(Path(f) / "model.safetensors").stat().st_size for f in ("small", healed.folder)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "level, trained",
    [
        ("mpo:bits=8,factors=bfloat16", {"P", "Q"}),
        ("dict:bits=8,atoms=bfloat16,values=float16", {"atoms", "values"}),
    ],
)
def test_factors_of_tensor_networks_and_dictionaries_are_trained(
    trained_llama: Any, write_model: Any, text_tokens: Any, there: Path, tmp_path: Path,
    level: str, trained: set[str],
) -> None:  # fmt: skip
    write_model(tmp_path, trained_llama, level, tokens=text_tokens(8, 32))
    small, teacher = str(tmp_path / "small"), str(tmp_path / "dense")
    settings = Tuning(
        **{**QUICK, "steps": 20}, train="factors", teacher=teacher, learning_rate=5e-4
    )
    healed = tune(small, tmp_path / "healed", settings, data=["text.txt"])
    assert healed.is_kept and healed.kl is not None and healed.kl[1] < healed.kl[0]
    old, new = (AutoModelForCausalLM.from_pretrained(f) for f in (small, healed.folder))
    before, after = old.state_dict(), new.state_dict()
    assert before.keys() == after.keys()
    assert {str(x.level) for x in compressed_linears(new).values()} == {
        str(compose.normalize(level))
    }
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        is_trained = name.rpartition(".")[2] in trained
        assert torch.equal(tensor, after[name]) != is_trained, name
    stored = sum(t.numel() for n, t in before.items() if n.rpartition(".")[2] in trained)
    assert healed.n_trained == stored
    sizes = [(Path(f) / "model.safetensors").stat().st_size for f in (small, healed.folder)]
    assert sizes[0] == sizes[1]


def test_what_a_teacher_trains_is_measured_as_stored_on_text_it_did_not_see(
    there: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained("small", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(there / "small" / name, tmp_path / "half" / name)
    # norms of 16 bits take no small steps
    wanted = {**QUICK, "steps": 60, "batch": 4, "learning_rate": 5e-4}
    settings = Tuning(**wanted, train="scales,norms", teacher="dense")
    healed = tune(
        str(tmp_path / "half"), tmp_path / "healed", settings, data=["text.txt"],
        targets=tmp_path / "teacher",
    )  # fmt: skip
    assert (tmp_path / "teacher" / "targets" / "index.json").is_file()
    assert healed.is_kept and healed.kl is not None and healed.kl[1] < healed.kl[0]
    assert not (tmp_path / "healed.work" / "targets").exists()
    made = AutoModelForCausalLM.from_pretrained(healed.folder, dtype="auto")
    assert made.dtype == torch.bfloat16
    norms, old = ({n: p for n, p in m.named_parameters() if "norm" in n} for m in (made, model))
    assert any(not torch.equal(p, old[n]) for n, p in norms.items())
    assert {p.dtype for p in norms.values()} == {torch.bfloat16}


def test_a_teacher_writes_text_to_learn_from(there: Path, tmp_path: Path) -> None:
    settings = Tuning(**QUICK, train="scales", teacher="dense", written=6)
    tune("small", tmp_path / "on", settings, data=["text.txt"], targets=tmp_path / "teacher")
    assert len(Targets(tmp_path / "teacher" / "targets")) == QUICK["sequences"] + 6
    assert (tmp_path / "teacher" / "written" / "written_00000.safetensors").is_file()
    with pytest.raises(ValueError, match="written text is a teacher's.* got 6"):
        Tuning(**QUICK, written=6)


def test_floats_that_came_no_closer_to_the_teacher_stay_as_they_were(
    there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Tuning(**QUICK, train="scales,norms", teacher="dense", learning_rate=10.0)
    worse = tune("small", tmp_path / "worse", settings, data=["text.txt"])
    assert not worse.is_kept and worse.kl is not None and worse.kl[1] >= worse.kl[0]
    assert "not kept" in caplog.text and not worse.perplexity
    one, two = (AutoModelForCausalLM.from_pretrained(f) for f in ("small", worse.folder))
    states = [x.state_dict() for x in (one, two)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_kernels_change_nothing_of_what_is_measured_and_kept(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are trained are float32, which kernels of stored ones once took for 16 bits."""
    settings = Tuning(**QUICK, train="scales,norms", teacher="dense")
    found = []
    for runtime in ("packed", "auto"):
        monkeypatch.setenv("HF_EVOPRESS_RUNTIME", runtime)
        found.append(tune("small", tmp_path / runtime, settings, data=["text.txt"]))
    reference, by_kernels = found
    assert reference.kl is not None and by_kernels.kl is not None
    assert by_kernels.kl == pytest.approx(reference.kl, rel=1e-3)
    assert by_kernels.is_kept == reference.is_kept


def test_perplexity_is_measured_before_and_after(there: Path, tmp_path: Path) -> None:
    text = {"itself": "test.txt"}
    settings = Tuning(**QUICK, target="kappa:0.3")
    result = tune("small", tmp_path / "k", settings, data=["text.txt"], tests=text, window=128)
    before, after = result.perplexity["itself"]
    assert before > 1 and after > 1 and before != after
    assert len(read_adapter(result.folder).ranks) == 6  # of 21 layers
    assert not (result.folder / "README.md").exists()  # PEFT's form; push writes a card


def test_merging_measures_what_rounding_costs(there: Path, tmp_path: Path) -> None:
    tuned = tune("small", tmp_path / "t", Tuning(**QUICK, learning_rate=1e-2), data=["text.txt"])
    result = merge(
        "small", str(tuned.folder), tmp_path / "merged", data=["text.txt"], against="dense",
        n_sequences=4, seq_len=32, window=32,
    )  # fmt: skip
    assert set(result.reports) == {"without adapter", "merged", "with adapter"}
    merged = AutoModelForCausalLM.from_pretrained(result.folder)
    assert len(compressed_linears(merged)) == 21


def test_an_exact_merge_loses_nothing(there: Path, tmp_path: Path, text_tokens: Any) -> None:
    eora = adapt(
        "small", tmp_path / "eora", data=["text.txt"], dense="dense", rank=2,
        n_sequences=4, seq_len=32,
    )  # fmt: skip
    result = merge("small", str(eora), tmp_path / "whole", exact=True)
    whole = AutoModelForCausalLM.from_pretrained(result.folder)
    beside = load_adapter(AutoModelForCausalLM.from_pretrained("small"), eora)
    ids = text_tokens(1, 24)
    assert torch.allclose(logits(whole, ids), logits(beside, ids), atol=1e-4)
    assert "lowrank:rank=2" in str(Plan.load(result.folder)["model.layers.0.mlp.up_proj"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": "scale"}, "cannot train 'scale'.*'scales'"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"target": "kappa:2"}, "such as kappa:0.2; got 'kappa:2'"),
        ({"target": "kappa:few"}, "such as kappa:0.2"),
        ({"train": "norms", "start": "x"}, "takes no adapter"),
    ],
)
def test_bad_settings_say_what_to_change(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tuning(**options)


def test_the_command_line_repairs_trains_and_merges(
    there: Path, tmp_path: Path, capsys: Any
) -> None:
    eora, tuned, merged = (str(tmp_path / name) for name in ("eora", "tuned", "merged"))
    small = ("--calibration", 4, "--seq-len", 32)
    text = ("--data", "text.txt")
    assert run("adapt", "small", "-o", eora, *text, "--rank", 2, "--dense", "dense", *small) == 0
    assert "21 layers, ranks 2 to 2" in " ".join(capsys.readouterr().out.split())
    steps = ("--steps", 2, "--batch", 2, "--sequences", 8, "--seq-len", 32, "--rank", 2)
    assert run("tune", "small", "-o", tuned, *text, *steps, "--test", "test.txt") == 0
    assert "parameters trained" in capsys.readouterr().out
    assert run("merge", "small", tuned, "-o", merged, *text, *small, "--window", 32) == 0
    assert "merged" in capsys.readouterr().out
    assert run("tune", "small", "-o", merged, *text, "--target", "q_prj") == 2
    assert "holds a model" in capsys.readouterr().err
    assert run("tune", "small", "-o", f"{tuned}2", *text, *steps, "--target", "q_prj") == 2
    assert "did you mean 'q_proj'" in " ".join(capsys.readouterr().err.split())
    assert run("merge", "small", "nowhere/", "-o", f"{merged}2") != 0


@pytest.mark.parametrize("train", ["lora", "scales,norms"])
def test_a_finished_or_half_written_training_is_gone_on_with_to_the_same_bytes(
    there: Path, tmp_path: Path, train: str
) -> None:
    settings = Tuning(**{**QUICK, "train": train, "save_steps": 50})
    out, state = tmp_path / "out", tmp_path / "out.work" / "checkpoint-4" / "trainer_state.json"
    made = tune("small", out, settings, data=["text.txt"])

    def all_files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = all_files()
    again = tune("small", out, settings, data=["text.txt"])
    assert again.losses == made.losses and len(made.losses) == 4
    assert all_files() == before  # not a step more
    state.write_text(state.read_text()[:100])  # as a killed Trainer leaves it
    (tmp_path / "out.work" / "checkpoint-9").mkdir()
    tune("small", out, settings, data=["text.txt"])
    assert all_files() == before


def test_merging_reads_the_column_that_is_named(
    there: Path, tmp_path: Path, structured_text: Any
) -> None:
    rows = [{"story": line, "other": "xx"} for line in structured_text(300).split("\n\n")]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune("small", tmp_path / "lora", Tuning(**{**QUICK, "steps": 1}), data=["text.txt"])
    words = ["merge", "small", tmp_path / "lora", "--out", tmp_path / "out", "--data", table]
    words += ["--calibration", "4", "--seq-len", "32"]
    assert run(*words, "--column", "tale") == 2
    assert run(*words, "--column", "story") == 0
    assert (tmp_path / "out" / "evopress_plan.json").is_file()
