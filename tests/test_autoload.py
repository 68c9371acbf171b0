"""Installed is enough: `import torch` alone makes from_pretrained load compressed models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
IDS = "torch.arange(40).view(2, 20)"
LOAD = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(FOLDER)
with torch.no_grad():
    print("sum", model({IDS}).logits.view(torch.int32).long().sum().item())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip leaves it: the entry points of pyproject.toml, and the file they name."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / "hf_evopress-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-evopress\nVersion: 0\n")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    shutil.copy(ROOT / "hf_evopress_autoload.py", folder)
    return folder


@pytest.fixture(scope="module")
def small(tiny_model: Any, write_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoload")
    return write_model(folder, tiny_model("llama"), "rtn:bits=4,group_size=32") / "small"


@pytest.fixture
def python(site: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """python(code, *paths, **environment): a fresh process that finds the site and `paths`."""

    def run(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        found = os.pathsep.join(map(str, (site, *paths)))
        env = {**os.environ, "PYTHONPATH": found, **environment}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path
        )

    return run


def test_a_fresh_process_loads_a_model_without_our_import(python: Any, small: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = python(LOAD.replace("FOLDER", repr(str(small))), ROOT)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        here = AutoModelForCausalLM.from_pretrained(small)(torch.arange(40).view(2, 20)).logits
    assert done.stdout.split() == ["sum", str(here.view(torch.int32).long().sum().item())]


def test_switched_off_the_error_names_the_plugin(python: Any, small: Path) -> None:
    code = LOAD.replace("FOLDER", repr(str(small)))
    done = python(code, ROOT, HF_EVOPRESS_AUTOLOAD="0")
    assert done.returncode != 0 and "RuntimeError" in done.stderr
    assert "this model is compressed: pip install hf-evopress" in done.stderr
    done = python(f"import hf_evopress\n{code}", ROOT, HF_EVOPRESS_AUTOLOAD="0")
    assert done.returncode == 0 and done.stdout.startswith("sum"), done.stderr


def test_a_broken_package_does_not_break_torch(python: Any, tmp_path: Path) -> None:
    (tmp_path / "broken" / "hf_evopress").mkdir(parents=True)
    (tmp_path / "broken" / "hf_evopress" / "__init__.py").write_text("raise OSError('gone')\n")
    code = "import torch, transformers.quantizers.auto; print('fine')"
    done = python(code, tmp_path / "broken")
    assert done.returncode == 0 and done.stdout.strip() == "fine"
    assert "cannot be imported (gone)" in done.stderr and "HF_EVOPRESS_AUTOLOAD=0" in done.stderr


def test_other_models_and_adapters_import_nothing_of_ours(python: Any, small: Path) -> None:
    dense = small.parent / "dense"
    code = f"""
import sys, torch
assert "hf_evopress" not in sys.modules
from transformers import AutoModelForCausalLM
from peft import LoraConfig, get_peft_model
model = AutoModelForCausalLM.from_pretrained({str(dense)!r})
get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
print(*(name for name in sys.modules if name.startswith("hf_evopress.")))
"""
    done = python(code, ROOT)
    assert done.returncode == 0, done.stderr
    light = {"hf_evopress.base", "hf_evopress.base.after_import", "hf_evopress.base.version"}
    light |= {"hf_evopress.loading", "hf_evopress.loading.offer"}
    # knows the name of the cache to generate(), and imports the cache when it is asked for
    light |= {"hf_evopress.loading.kv_cache", "hf_evopress.loading.kv_cache.generation"}
    # knows the word `size` of from_pretrained()
    light |= {"hf_evopress.jobs", "hf_evopress.jobs.sized_models"}
    assert set(done.stdout.split()) <= light
