"""The code of README and guides: Python blocks are run, on tiny models; every command is parsed.

What a block names is made first, in an empty folder: a name with "bit" in it is a compressed
model, one with "eora" or "adapter" an adapter, *.txt a text, any other owner/name a dense model.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.main import get_command

from hf_evopress import EvoPressConfig, Plan
from hf_evopress.cli import app
from hf_evopress.models.units import find_units

from .hub_server import Hub

ROOT = Path(__file__).parent.parent
# in the order that their code runs in: what a block uses is of its own page or of the README
PAGES = [ROOT / "README.md", *(ROOT / f"docs/{n}.md" for n in ("running", "formats", "sizes"))]
PAGES.append(ROOT / "docs/results.md")
DOCS = sorted((ROOT / "docs").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The lines of the shell blocks: continued lines joined, comments and outputs left out."""
    text = "\n".join(blocks("sh") + blocks("bash")).replace("\\\n", " ")
    text = re.sub(r"^torchrun \S+ \d+ -m hf_evopress", "hf-evopress", text, flags=re.MULTILINE)
    lines = (line.partition(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def of(program: str) -> list[str]:
    return [line for line in commands() if line.startswith(program + " ")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


LINKED = ["README.md", "tests/benchmarks/README.md", *(f"docs/{p.name}" for p in DOCS)]


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Callable[..., nn.Module],
    byte_tokenizer: PreTrainedTokenizerFast,
    structured_text: Callable[..., str],
) -> Path:
    """A working folder that holds everything the Python blocks name."""
    monkeypatch.chdir(tmp_path)
    for name in sorted(set(re.findall(r'"([\w./-]+)"', "\n".join(blocks("python"))))):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            path.write_text(structured_text())
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and ("/" in name or is_compressed(name)):
            _model(path, name, tiny_model(max_position_embeddings=2048))
            byte_tokenizer.save_pretrained(path)
    return tmp_path


def is_compressed(name: str) -> bool:
    """Return whether a name says so: it ends with a size, in bits per weight or megabytes."""
    return re.search(r"\d(bit|MB)", name) is not None


def _model(path: Path, name: str, model: nn.Module) -> None:
    if re.search("eora|adapter", name):
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        adapter.save_pretrained(path, save_embedding_layers=False)
        return
    model.save_pretrained(path)
    if is_compressed(name):
        units = find_units(model)
        levels = {unit.name: "rtn:bits=4,group_size=32" for unit in units}
        plan = Plan(levels, {unit.name: unit.shape for unit in units}, base_model=name)
        small = AutoModelForCausalLM.from_pretrained(path, quantization_config=EvoPressConfig(plan))
        small.save_pretrained(path)
        plan.save(path)


@pytest.mark.slow
def test_the_python_blocks_run_in_order(hub: Hub, place: Path) -> None:
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks("python"), start=1):
        exec(compile(block, f"Python block {number} of {len(PAGES)} pages", "exec"), namespace)


def test_there_is_code_to_check() -> None:
    assert blocks("python") and of("hf-evopress") and of("make")


@pytest.mark.parametrize("line", of("hf-evopress") + of("optimum-cli evopress"))
def test_a_command_is_understood(line: str) -> None:
    words = shlex.split(line.removeprefix("optimum-cli evopress").removeprefix("hf-evopress"))
    group = get_command(app)
    with group.make_context("hf-evopress", list(words)) as context:
        name, command, rest = group.resolve_command(
            context, [*context._protected_args, *context.args]
        )  # type: ignore[attr-defined]
        assert command is not None
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", of("make"))
def test_a_make_target_is_there(line: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in shlex.split(line)[1:]:
        assert "=" in target or re.search(rf"^{re.escape(target)}\b.*:", makefile, re.MULTILINE)


@pytest.mark.parametrize("line", of("python"))
def test_a_script_is_there(line: str) -> None:
    script = shlex.split(line)[1]
    assert script in ("-m", "-c") or (ROOT / script).is_file()


@pytest.mark.parametrize("page", sorted(LINKED), ids=str)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", read(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
