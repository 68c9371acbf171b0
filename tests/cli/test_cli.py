"""The command line does the whole job, teaches, and says in one line what was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_evopress.cli import main
from hf_evopress.plans.plan import Plan

SMALL = ["--seq-len", "64", "--calibration", "16", "--search-pool", "16"]
LEVELS = [x for b in (2, 3, 4) for x in ("--level", f"gptq:bits={b},group_size=32")]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(w) for w in words])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def _common(home: Path) -> list[str | Path]:
    return ["--data", home / "text.txt", "--work", home / "work", *SMALL, *LEVELS]


def test_levels_search_apply_evaluate_and_show_follow_each_other(home: Path, run: Run) -> None:
    code, out, err = run("levels", home / "dense", *_common(home))
    assert code == 0 and "gptq:bits=2,group_size=32" in out, err
    plan = home / "plan.json"
    words = ["--bits", "3.3", "--strategy", "knapsack", "--out", plan]
    code, out, err = run("search", home / "dense", *_common(home), *words)
    assert code == 0 and Plan.load(plan).budget["bits_per_weight"] <= 3.3, err
    code, out, err = run(
        "apply", plan, "--out", home / "small", "--data", home / "text.txt", *SMALL[:4]
    )
    assert code == 0, err
    words = [
        "--against",
        home / "dense",
        "--data",
        home / "text.txt",
        "--window",
        "64",
        "--max-windows",
        "4",
    ]
    code, out, err = run("evaluate", home / "small", *words, "--json")
    assert code == 0 and json.loads(out)["kl_nats"] > 0, err
    code, out, err = run("show", home / "small", "--plot", home / "plan.png", "--units")
    assert (
        code == 0 and "gptq:bits=3,group_size=32" in out and (home / "plan.png").stat().st_size > 0
    )
    assert run("diff", plan, home / "small")[0] == 0


def test_what_is_infinite_is_null_in_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"perplexity": float("inf"), "nll_windows": [1.0, float("inf")], "window": 8}
    monkeypatch.setattr("hf_evopress.jobs.evaluate.evaluate_model", lambda *a, **k: found)
    code, out, err = run("evaluate", "any", "--data", "text.txt", "--json")
    assert code == 0, err
    assert json.loads(out) == {"perplexity": None, "nll_windows": [1.0, None], "window": 8}


def test_compress_does_the_whole_line_and_prints_the_table(home: Path, run: Run) -> None:
    code, out, err = run(
        "compress", home / "dense", *_common(home), "--bits", "3.6", "--out", home / "out",
        "--generations", "1",
    )  # fmt: skip
    assert code == 0, err
    assert "uniform gptq:bits=3,group_size=32" in out and "searched" in out and "It says:" in out
    code, out, _ = run(
        "run", home / "out" / "evopress_recipe.yaml", "budget.bits=3.2", f"out={home / 'o2'}"
    )
    assert code == 0 and Plan.load(home / "o2").budget["bits_per_weight"] <= 3.2


@pytest.mark.parametrize(
    "command", ["", "compress", "levels", "search", "apply", "evaluate", "show"]
)
def test_help_teaches_every_command(run: Run, command: str) -> None:
    code, out, _ = run(*([command] if command else []), "--help")
    assert code == 0 and "hf-evopress" in out


def test_list_describes_methods(run: Run) -> None:
    assert "gptq" in run("list")[1]
    assert "arXiv" in run("list", "gptq")[1]
    trellis = run("list", "trellis")[1]
    assert "parameter" in trellis and "tail_biting" in trellis and "damp_outputs" in trellis
    for name in ("PVTuning", "make_quest", "GradualPruning", "GearCache", "kick", "stack"):
        assert name in run("list")[1]
        assert run("list", name)[1].count("\n") > 3
    assert "linears" not in run("list")[1]  # what formats have in common is none
    code, _, err = run("list", "gtpq")
    assert code == 2 and "did you mean 'gptq'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "1"], "smallest possible is"),
        ([], "needs a budget"),
        (["--bits", "3", "--ratio", "0.5"], "in one way"),
        (["--bits", "3", "--strategy", "evolv"], "did you mean 'evolve'"),
        (["--bits", "3", "--pin", "x"], "PATTERN=LEVEL"),
        (["--bits", "3", "--generations", "-1"], "at least"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    home: Path, run: Run, words: list[str], message: str
) -> None:
    code, _, err = run("compress", home / "dense", *_common(home), "--out", home / "bad", *words)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err


def test_a_missing_model_is_an_error_not_a_trace(tmp_path: Path, run: Run) -> None:
    code, _, err = run("compress", tmp_path / "no-model", "--bits", "3", "--out", tmp_path / "x")
    assert code != 0 and "no-model" in err and "Traceback" not in err


def test_ctrl_c_says_that_what_was_finished_is_kept(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Plan, "from_pretrained", stopped)
    code, _, err = run("show", "some")
    assert code == 130 and "the same command goes on from there" in " ".join(err.split())


def test_unknown_options_exit_with_two(run: Run) -> None:
    code, _, err = run("compress", "m", "--out", "x", "--bitz", "3")
    assert code == 2 and "--bits" in err


def test_version_is_printed(run: Run) -> None:
    from hf_evopress import __version__

    assert run("--version")[1].strip() == f"hf-evopress {__version__}"


def test_the_module_runs_as_a_program() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "hf_evopress", "list"], capture_output=True, text=True
    )
    assert out.returncode == 0 and "rtn" in out.stdout
