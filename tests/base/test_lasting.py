"""Tables that a cache keeps are of use to all who come after the first."""

from __future__ import annotations

import threading
from functools import lru_cache

import torch
from torch import Tensor

from hf_evopress.base.lasting import lasting


def test_what_is_first_made_in_inference_mode_can_be_used_for_gradients() -> None:
    @lru_cache(maxsize=None)
    @lasting
    def table(n: int) -> Tensor:
        return torch.arange(n).float() * 2

    with torch.inference_mode():
        assert not table(3).is_inference()
    x = torch.ones(3, requires_grad=True)
    (x * table(3)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 2, 4]


def test_for_a_gpu_another_thread_makes_it() -> None:
    @lasting
    def thread(n: int, device: torch.device | None) -> tuple[int, int]:
        return n, threading.get_ident()

    here = 1, threading.get_ident()
    assert thread(1, torch.device("cpu")) == here == thread(1, device=None)
    assert thread(1, torch.device("cuda")) != here != thread(1, device=torch.device("cuda:1"))


def test_what_is_first_made_while_a_graph_is_exported_has_its_numbers() -> None:
    @lru_cache(maxsize=None)
    @lasting
    def table(n: int) -> Tensor:
        return torch.arange(n).float() * 2

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * table(3)

    exported = torch.export.export(Module(), (torch.ones(2, 3),), strict=False)
    assert type(table(3)) is Tensor and table(3).tolist() == [0, 2, 4]
    assert exported.module()(torch.ones(2, 3))[1].tolist() == [0, 2, 4]
