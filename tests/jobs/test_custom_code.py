"""Models with code of their own: refused at once, or compressed with it where it is trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.repair import adapt
from hf_evopress.jobs.apply import apply_plan
from hf_evopress.jobs.convert import convert
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.jobs.refine_existing_model import refine_end_to_end
from hf_evopress.jobs.refine_existing_plan import refine_plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def home(
    tiny_model: Callable[..., nn.Module],
    write_model: Any,
    structured_text: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with text.txt and dense/, a model whose classes are in modeling_own.py."""
    folder: Path = write_model(tmp_path_factory.mktemp("own"), tiny_model("llama").bfloat16())
    (folder / "text.txt").write_text(structured_text(200))
    dense = folder / "dense"
    (dense / "modeling_own.py").write_text(CODE)
    config = json.loads((dense / "config.json").read_text())
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {auto: f"modeling_own.{name}" for auto, name in names.items()},
    }
    (dense / "config.json").write_text(json.dumps(config))
    return folder


def recipe(home: Path, *, trust: bool) -> Recipe:
    counts = {"seq_len": 32, "calibration": 4, "search": 2, "heldout": 1, "test": 2}
    return Recipe.from_dict(
        {
            "model": str(home / "dense"),
            "out": str(home / "out"),
            "trust_remote_code": trust,
            "budget": {"bits": 4.0},
            "levels": [f"rtn:bits={b},group_size=32" for b in (3, 4)],
            "data": {"sources": [str(home / "text.txt")], **counts},
            "search": {"strategy": "knapsack", "sensitivity_tokens": 64},
        }
    )


def test_code_that_was_not_trusted_is_not_run(home: Path) -> None:
    with pytest.raises(ValueError, match=r"code of its own.*--trust-remote-code"):
        Job(recipe(home, trust=False))


def test_trusted_code_comes_along_and_loads_the_result(home: Path) -> None:
    folder = compress(recipe(home, trust=False), trust_remote_code=True).folder
    assert (folder / "modeling_own.py").read_text() == CODE
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert type(model.hf_quantizer).__name__ == "EvoPressQuantizer"


def test_every_door_takes_and_asks_for_trust(home: Path, tmp_path: Path) -> None:
    small = home / "out"
    if not small.is_dir():  # another process did the test above
        compress(recipe(home, trust=True))
    text, dense = str(home / "text.txt"), str(home / "dense")
    data: dict[str, Any] = {"data": [text], "seq_len": 32}
    plan = str(small / "evopress_plan.json")
    doors: dict[str, Callable[..., Any]] = {
        "evaluate": partial(evaluate_model, str(small), text, against=dense, window=32),
        "adapt": partial(adapt, str(small), dense=dense, rank=2, n_sequences=4, **data),
        "tune": partial(tune, str(small), settings=Tuning(steps=1, seq_len=32, sequences=4)),
        "apply": partial(apply_plan, plan, model=dense),
        "export": partial(convert, str(small), format="dense"),
        "end-to-end": partial(refine_end_to_end, str(small), steps=1, n_sequences=4, **data),
        "refine": partial(
            refine_plan, plan, model=dense, mode="fast", n_sequences=4, search_pool=4, **data
        ),
    }
    for name, door in doors.items():
        more: dict[str, Any] = {} if name == "evaluate" else {"out": tmp_path / name}
        more |= {"data": [text]} if name == "tune" else {}
        with pytest.raises(ValueError, match=r"code of its own.*trust_remote_code=True"):
            door(**more)
        assert door(**more, trust_remote_code=True)
    for name in ("apply", "export", "end-to-end", "refine"):
        assert (tmp_path / name / "modeling_own.py").read_text() == CODE
