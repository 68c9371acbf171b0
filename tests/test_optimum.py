"""`optimum-cli evopress`: the same command line, under optimum's, without slowing it down."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REGISTER = "optimum/commands/register/register_evopress.py"

# what optimum-cli runs, whatever the scripts folder is called
MAIN = "from optimum.commands.optimum_cli import main; main()"


def optimum_cli(*words: str, code: str = MAIN, path: Path = ROOT) -> subprocess.CompletedProcess:
    # an editable install puts the checkout on the path; only `path` is to be seen
    start = (
        "import sys; sys.argv[0] = 'optimum-cli'\n"
        f"sys.path[:] = [{str(path)!r}, *(p for p in sys.path if p not in ('', {str(ROOT)!r}))]"
    )
    return subprocess.run(
        [sys.executable, "-c", f"{start}\n{code}", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        cwd=path,
    )


def hf_evopress(*words: str) -> subprocess.CompletedProcess:
    code = "from hf_evopress.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
        cwd=ROOT,
    )


def test_optimum_lists_the_command_without_importing_torch() -> None:
    code = f"try:\n    {MAIN}\nexcept SystemExit: pass\nprint(sorted(sys.modules), 'end')"
    run = optimum_cli("--help", code=code)
    assert "Compress a model to a size" in run.stdout
    modules = run.stdout.splitlines()[-1]
    assert "'optimum.commands.register.register_evopress'" in modules
    assert "'torch'" not in modules and "'transformers'" not in modules
    assert "'hf_evopress'" not in modules


@pytest.mark.parametrize("words", [["--help"], ["export", "--help"], ["list", "gptq"]])
def test_it_prints_what_hf_evopress_prints(words: list[str]) -> None:
    ours, theirs = hf_evopress(*words), optimum_cli("evopress", *words)
    assert theirs.returncode == ours.returncode == 0
    assert theirs.stdout.replace("optimum-cli evopress", "hf-evopress") == ours.stdout


def test_options_and_exit_codes_pass_through() -> None:
    run = optimum_cli("evopress", "list", "gptqq")
    assert run.returncode == 2 and "did you mean 'gptq'" in run.stderr
    assert optimum_cli("evopress", "--version").stdout.startswith("hf-evopress ")


def test_without_words_it_prints_help() -> None:
    assert "Commands:" in optimum_cli("evopress").stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked; needs the build backend, or an index to fetch it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(folder),
        str(ROOT),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"the wheel cannot be built here: {run.stderr.strip()[-300:]}")
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_registers_the_command(wheel: Path) -> None:
    assert (wheel / REGISTER).is_file()
    assert not list((wheel / "optimum").rglob("__init__.py"))
    run = optimum_cli("evopress", "show", "--help", path=wheel)
    assert run.returncode == 0 and "heat map" in run.stdout
    where = optimum_cli(code="import hf_evopress; print(hf_evopress.__file__)", path=wheel)
    assert where.stdout.startswith(str(wheel))


@pytest.mark.slow
def test_the_wheel_carries_cards_and_recipes(wheel: Path) -> None:
    code = (
        "from hf_evopress.base.resources import bundled;"
        "from hf_evopress.recipes.recipe import Recipe;"
        "assert (bundled('model_cards') / 'report.html').is_file();"
        "assert (bundled('recipes') / 'schema.json').is_file();"
        "print(bundled('recipes'), Recipe.load('smollm2-135m-3.3bit').budget.bits)"
    )
    run = optimum_cli(code=code, path=wheel)
    assert run.stdout.startswith(str(wheel)) and run.stdout.strip().endswith("3.3"), run.stderr
