"""What is shipped against what was scored: to the bit where a device has one order of sums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from hf_evopress.base.placement import Place, computing_in, visiting
from hf_evopress.jobs.measure import _reload, check_reloaded
from hf_evopress.models.classes import CAUSAL
from hf_evopress.plans.plan import Plan

PLAN = Plan({"lm_head": "dense"})
TOKENS = torch.arange(16).view(2, 8)


@dataclass
class Scored:
    """Logits that depend on the batch size, as those of an accelerator may."""

    device: torch.device
    by_batch: float = 0.0
    tokens: Tensor = TOKENS

    def logits(self, levels: Any, ids: Tensor) -> Tensor:
        made = torch.ones(*ids.shape, 4) + self.by_batch * (len(ids) - 1)
        return made.to(ids.device)


class Reloaded(nn.Module):
    """A model whose logits differ from those that were scored."""

    config = LlamaConfig()

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=(torch.ones(1, 8, 4) + self.by).to(input_ids.device))


def test_on_a_cpu_any_difference_is_an_error() -> None:
    scored = Scored(torch.device("cpu"), by_batch=1.0)
    check_reloaded(scored, PLAN, Reloaded(0.0))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"largest difference 1.19e-07\)"):
        check_reloaded(scored, PLAN, Reloaded(2.0**-23))  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["sim"], indirect=True)
def test_elsewhere_what_another_order_of_sums_makes_is_none(device: torch.device) -> None:
    scored = Scored(device, by_batch=0.01)
    check_reloaded(scored, PLAN, Reloaded(0.03))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"difference 0.1, 0.04 would be rounding"):
        check_reloaded(scored, PLAN, Reloaded(0.1))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="difference nan"):
        check_reloaded(scored, PLAN, Reloaded(float("nan")))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="largest difference"):  # where there is one order
        check_reloaded(Scored(device), PLAN, Reloaded(0.01))  # type: ignore[arg-type]


@torch.no_grad()
def test_positions_that_are_in_no_file_are_rounded_as_those_that_were_scored(
    tmp_path: Path,
) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32}
    config = AutoConfig.for_model("xglm", **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    job: Any = SimpleNamespace(kind=CAUSAL, model=model, dtype=torch.bfloat16, device="cpu")
    job.recipe, job.fit = SimpleNamespace(trust_remote_code=False), lambda model: None
    with computing_in(model, torch.float32):
        reloaded = _reload(job, tmp_path)
        with visiting(model, Place(dtype=torch.float32)):
            assert torch.equal(reloaded(TOKENS).logits, model(TOKENS).logits)
