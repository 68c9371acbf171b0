"""The distillation loss is the fitness of the search, with a gradient; targets survive a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.refine.distillation import (
    Targets,
    distillation_loss,
    precompute_targets,
    teacher_targets,
)
from hf_evopress.scoring.fitness.kl import KL


@pytest.mark.parametrize("top_k", [4, 64, 96])
def test_the_loss_is_the_fitness_of_the_search(top_k: int) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 96) * 3, torch.randn(2, 5, 96) * 3
    ids, log_p = teacher_targets(teacher, top_k)
    assert ids.shape == (2, 5, top_k)
    fitness = KL(top_k=top_k)
    rows = [
        fitness.loss(s, s, fitness.targets(t, t)) for s, t in zip(student, teacher, strict=True)
    ]
    assert float(distillation_loss(student, ids, log_p)) == pytest.approx(sum(rows) / 2, rel=1e-4)


def test_the_gradient_vanishes_at_the_teacher_and_is_finite_where_the_student_is_sure() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(1, 5, 96)
    ids, log_p = teacher_targets(teacher, 8)
    same = teacher.clone().requires_grad_()
    distillation_loss(same, ids, log_p).backward()
    assert same.grad is not None and float(same.grad.abs().max()) < 1e-6
    sure = torch.zeros(1, 5, 96)
    sure[..., 3] = 200.0
    sure.requires_grad_()
    distillation_loss(sure, ids, log_p).backward()
    assert sure.grad is not None and bool(sure.grad.isfinite().all()) and bool(sure.grad.any())


def test_only_masked_positions_count() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(1, 6, 96), torch.randn(1, 6, 96)
    ids, log_p = teacher_targets(teacher, 8)
    mask = torch.tensor([[True, True, False, False, False, False]])
    part = distillation_loss(student[:, :2], ids[:, :2], log_p[:, :2])
    assert torch.allclose(distillation_loss(student, ids, log_p, mask), part)


def test_targets_of_another_shape_are_refused() -> None:
    ids, log_p = teacher_targets(torch.randn(1, 6, 96), 8)
    with pytest.raises(ValueError, match=r"\(1, 6, 8\) are not for logits of \(1, 5, 96\)"):
        distillation_loss(torch.randn(1, 5, 96), ids, log_p)


def test_targets_from_disk_are_those_of_the_teacher(
    tiny_model: Any, text_tokens: Any, tmp_path: Path
) -> None:
    teacher, tokens = tiny_model(), text_tokens(18, 16)
    data = Targets(precompute_targets(teacher, tokens, tmp_path, top_k=8))
    assert len(data) == 18
    with torch.no_grad():
        ids, log_p = teacher_targets(teacher(input_ids=tokens[17:], use_cache=False).logits, 8)
    assert torch.equal(data[17]["input_ids"], tokens[17])
    assert torch.equal(data[17]["target_ids"], ids[0])
    assert torch.equal(data[17]["target_log_p"], log_p[0])


def test_a_killed_run_goes_on_and_other_targets_are_not_mixed_in(
    tiny_model: Any, text_tokens: Any, tmp_path: Path
) -> None:
    teacher, tokens = tiny_model(), text_tokens(18, 16)
    precompute_targets(teacher, tokens, tmp_path, top_k=8)
    (tmp_path / "targets_00001.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 files are missing"):
        Targets(tmp_path)
    before = (tmp_path / "targets_00000.safetensors").stat().st_mtime_ns
    precompute_targets(teacher, tokens, tmp_path, top_k=8)
    assert (tmp_path / "targets_00000.safetensors").stat().st_mtime_ns == before
    assert len(Targets(tmp_path)) == 18
    with pytest.raises(ValueError, match="made with other top_k"):
        precompute_targets(teacher, tokens, tmp_path, top_k=4)
    with pytest.raises(FileNotFoundError, match="run precompute_targets"):
        Targets(tmp_path / "nowhere")
