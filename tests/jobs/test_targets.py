"""No command writes over what is not its own: models, work folders, texts, other results."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_evopress.base.lock import locked
from hf_evopress.base.target import FILES
from hf_evopress.cli import main
from hf_evopress.plans.plan import Plan

QUICK = ["--seq-len", "64", "--calibration", "8", "--search-pool", "8", "--generations", "1"]
RTN = ["--level", "rtn:bits=4,group_size=32", "--level", "rtn:bits=8,group_size=32"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*words: str | Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(w) for w in words])
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


Run = Callable[..., tuple[int, str]]


def contents(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def small(home: Path) -> Path:
    """A compressed model and its plan file."""
    dense, text = home / "dense", home / "text.txt"
    words = ["compress", dense, "--bits", "5", "--data", text, "--out", home / "small", *QUICK]
    with pytest.raises(SystemExit) as ended:
        main([str(w) for w in [*words, *RTN]])
    assert not ended.value.code
    Plan.load(home / "small").save(home / "plan.json")
    return home / "small"


COMMANDS = {
    "compress": "compress {dense} --bits 4.5 --data {text}",
    "apply": "apply {plan} --model {dense}",
    "export": "export {small} --format dense",
    "merge": "merge {small} {adapter} --exact",
    "tune": "tune {small} --data {text} --train scales",
    "adapt": "adapt {small} --data {text} --rank 2",
    "refine": "refine {plan} --model {dense} --data {text}",
    "distil": "refine {small} --mode end-to-end --data {text}",
}
READ = {  # what each command reads, of which none may be its target
    "compress": ("dense",),
    "apply": ("dense", "plan"),
    "export": ("small",),
    "merge": ("small", "adapter"),
    "tune": ("small",),
    "adapt": ("small",),
    "refine": ("dense", "plan"),
    "distil": ("small",),
}


@pytest.fixture
def names(home: Path, small: Path) -> dict[str, Path]:
    adapter = home / "adapter"
    adapter.mkdir(exist_ok=True)
    found = {"dense": home / "dense", "text": home / "text.txt", "small": small}
    return {**found, "plan": home / "plan.json", "adapter": adapter}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_the_user_is_never_replaced(
    command: str, names: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    shutil.copytree(names["dense"], precious)
    (precious / "notes.txt").write_text("years of work")
    before = contents(precious)
    code, err = run(*COMMANDS[command].format(**names).split(), "--out", f"{precious}/")
    assert code == 2 and ("--overwrite" in err or "holds a model" in err), err
    assert contents(tmp_path) == {f"precious/{k}": v for k, v in before.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_reads_is_never_its_target(
    command: str, names: dict[str, Path], home: Path, run: Run, tmp_path: Path
) -> None:
    before = contents(home)
    for name in READ[command]:
        source = names[name]
        (tmp_path / name).symlink_to(source)
        for out in (source, f"{source}/", tmp_path / name, home):
            words = COMMANDS[command].format(**names).split()
            code, err = run(*words, "--out", out, "--overwrite")
            assert code == 2 and ("which is read" in err or "is a file" in err), (out, err)
    assert contents(home) == before


def test_the_work_folder_is_not_a_target(home: Path, run: Run, tmp_path: Path) -> None:
    words = ["compress", home / "dense", "--bits", "5", "--data", home / "text.txt", *QUICK]
    for work in (tmp_path, tmp_path / "deep" / "work"):
        work.mkdir(parents=True, exist_ok=True)
        code, err = run(*words, "--work", work, "--out", tmp_path)
        assert code == 2 and "which is read" in err
    assert not contents(tmp_path)


def test_an_earlier_result_is_replaced_and_notes_beside_it_stay(
    home: Path, small: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(small, out)
    (out / "notes.txt").write_text("mine")
    assert run("export", small, "--format", "dense", "--out", out)[0] == 0
    names = {p.name for p in out.iterdir()}
    assert {"notes.txt", "config.json", "evopress_plan.json", FILES} <= names
    assert "evopress_recipe.yaml" not in names  # of the model that was there before
    assert (out / "notes.txt").read_text() == "mine"


def test_overwrite_replaces_what_the_user_says(small: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "junk.bin").write_text("x")
    words = ["export", small, "--format", "dense", "--out", tmp_path / "out"]
    assert run(*words)[0] == 2
    assert run(*words, "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "junk.bin").exists()


def test_a_plan_or_a_picture_does_not_replace_another_file(
    home: Path, names: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    text = names["text"].read_text()
    common = ["--data", names["text"], "--work", tmp_path / "work", "--bits", "5", *QUICK, *RTN]
    config = names["dense"] / "config.json"
    before = config.read_text()
    code, err = run("search", names["dense"], *common, "--out", config)
    assert code == 2 and "--overwrite" in err and config.read_text() == before
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"a cat")
    code, err = run("show", names["plan"], "--plot", picture)
    assert code == 2 and picture.read_bytes() == b"a cat"
    for words in (["report", names["plan"], "--out"], ["export-config", names["plan"]]):
        assert run(*words, names["text"])[0] == 2
    assert names["text"].read_text() == text
    for _ in range(2):  # a picture and a page of ours are drawn again
        assert run("show", names["plan"], "--plot", tmp_path / "plan.png")[0] == 0
        assert run("report", names["plan"], "--out", tmp_path / "page.html")[0] == 0


HOLD = """
import sys
from hf_evopress.base.target import claimed
with claimed(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_with_the_same_target_is_told_who_writes_there(
    home: Path, small: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    words = ["export", small, "--format", "dense", "--out", out]
    code, err = run(*words)
    assert code == 1 and f"is being written by process {other.pid}" in err
    other.kill()
    other.wait()
    assert run(*words)[0] == 0
    with locked(tmp_path / ".out.evopress-lock", "out"):
        pass  # let go of at the end
