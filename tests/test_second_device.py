"""The second device refuses what CUDA refuses, allows what it allows, and counts its bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .conftest import make_tiny_model
from .second_device import Sim, live_bytes, memory_of, n_syncs, peak_bytes, reset_peak

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(24).view(2, 12) * 7 % 256


def sim(x: Tensor = X) -> Tensor:
    return x.to("sim")


REFUSED: dict[str, Callable[[], object]] = {
    "sum": lambda: sim() + X,
    "product": lambda: sim() @ X.T,
    "concatenation": lambda: torch.cat([sim(), X]),
    "matrix with a CPU vector": lambda: torch.addmm(X[0], sim(), sim(X.T)[:, :4].contiguous()),
    "in place": lambda: sim().add_(X),
    "in place on the CPU": lambda: X.clone().add_(sim()),
    "a CPU scalar written to": lambda: torch.tensor(1.0).add_(sim().sum()),
    "mask on the CPU": lambda: sim().masked_fill_(X > 0, 0.0),
    "choice by the CPU": lambda: torch.where(X > 0, sim(), sim()),
    "CPU tensor at indices of the device": lambda: X[sim(torch.tensor([0, 2]))],
    "values of the CPU at indices": lambda: sim().index_put_((torch.tensor([0]),), X[:1]),
    "index_select by the CPU": lambda: sim().index_select(0, torch.tensor([1])),
    "index_add_ by the CPU": lambda: sim().index_add_(0, torch.tensor([1]), sim(X[:1])),
    "gather by the CPU": lambda: sim().gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "embedding by the CPU": lambda: F.embedding(torch.tensor([1]), sim()),
    "linear with weights on the CPU": lambda: nn.Linear(4, 2)(sim()),
    "another card": lambda: sim() + X.to("sim:1"),
    "generator of the CPU": lambda: torch.rand(2, generator=torch.Generator(), device="sim"),
    "numpy": lambda: sim().numpy(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses_is_refused(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match="device"):
        REFUSED[what]()


ALLOWED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    name: (f, f)
    for name, f in {
        "CPU scalar": lambda x: x * torch.tensor(2.0),
        "choice of a CPU scalar": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
        "CPU indices": lambda x: x[torch.tensor([2, 0])],
        "CPU mask": lambda x: x[torch.tensor([True, False, True])],
        "values at CPU indices": lambda x: x.clone().index_put_((torch.tensor([1]),), x[:1]),
        "scalar at CPU indices": lambda x: _assigned(x),
        "embedding": lambda x: F.embedding(torch.tensor([[2, 1]]).to(x.device), x),
        "index_add_": lambda x: x.clone().index_add_(0, torch.tensor([1]).to(x.device), x[:1]),
        "top values": lambda x: torch.topk(x, 2).values,
        "eigenvectors": lambda x: torch.linalg.eigh(x @ x.T)[0],
        "Cholesky": lambda x: torch.linalg.cholesky(x @ x.T),
        "singular values": lambda x: torch.linalg.svd(x).S,
        "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
        "bytes": lambda x: x.view(torch.uint8),
        "out": lambda x: torch.mm(x, x.T, out=torch.empty(0, device=x.device)),
        "shape in place": lambda x: x.clone().unsqueeze_(0).squeeze_(0).t_(),
        "half": lambda x: x.to(torch.float16) * 2,
        "bfloat16": lambda x: x.bfloat16() @ x.bfloat16().T,
        "made there": lambda x: torch.arange(5, device=x.device) + torch.eye(5, device=x.device),
        "of a list": lambda x: torch.tensor([[1.0, 2.0]], device=x.device),
    }.items()
}


def _assigned(x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.tensor([0, 2]), 1:] = torch.tensor(7.0)
    return y


@pytest.mark.parametrize("what", ALLOWED)
def test_what_a_gpu_allows_gives_what_the_cpu_gives(what: str) -> None:
    f, g = ALLOWED[what]
    made, wanted = f(sim()), g(X)
    assert isinstance(made, Sim) and made.device == torch.device("sim:0")
    assert made.shape == wanted.shape and made.dtype == wanted.dtype
    assert torch.equal(made.cpu(), wanted)


def test_copies_go_both_ways_and_keep_their_values() -> None:
    there = torch.zeros(3, 4, device="sim")
    there.copy_(X, non_blocking=True)
    here = torch.zeros(3, 4).copy_(there)
    assert type(here) is Tensor and torch.equal(here, X)
    assert there.to("cpu", torch.float64).dtype == torch.float64
    other = there.to("sim:1")
    assert other.device == torch.device("sim:1") and torch.equal(other.cpu(), X)
    assert there.tolist() == X.tolist() and float(there.sum()) == float(X.sum())


def test_a_view_shares_memory_with_what_it_views() -> None:
    x = sim()
    x[0].zero_()
    part = x.T[1]
    part += 5
    wanted = X.clone()
    wanted[0] = 0
    wanted[:, 1] += 5
    assert torch.equal(x.cpu(), wanted)


def test_a_model_runs_there_and_its_gradients_are_the_cpus() -> None:
    model = make_tiny_model("llama")
    there = copy.deepcopy(model).to("sim")
    for m, ids in ((model, TOKENS), (there, TOKENS.to("sim"))):
        m(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # type: ignore[operator]
    for ours, theirs in zip(there.parameters(), model.parameters(), strict=True):
        assert ours.device.type == "sim" and ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="device"):
        there(input_ids=TOKENS)


def test_generation_is_the_cpus() -> None:
    model = make_tiny_model("qwen3")
    settings = {"max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(TOKENS, **settings)  # type: ignore[operator]
    made = model.to("sim").generate(TOKENS.to("sim"), **settings)  # type: ignore[operator]
    assert made.cpu().tolist() == wanted.tolist()


def test_modules_move_load_and_change_their_type() -> None:
    layer = nn.Linear(4, 2)
    values = copy.deepcopy(layer.state_dict())
    layer.to("sim")
    weight = layer.weight
    assert isinstance(weight, nn.Parameter) and weight.device.type == "sim"
    layer.half().float()
    layer.load_state_dict(values)  # from the CPU, as on a GPU
    assert torch.equal(layer.weight.cpu(), values["weight"])
    layer.weight.data = layer.weight.data * 2
    assert torch.equal(layer.weight.cpu(), values["weight"] * 2)
    with pytest.raises(RuntimeError, match="device"):
        layer.weight.data = values["weight"]
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(sim()).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight.cpu(), values["weight"] * 2)
    assert type(layer.cpu().weight) is nn.Parameter


def test_safetensors_files_are_written_and_read_through_the_cpu(tmp_path: object) -> None:
    file = f"{tmp_path}/x.safetensors"
    save_file({"x": sim(), "y": X.bfloat16().to("sim")}, file)
    read = load_file(file)
    assert torch.equal(read["x"], X) and torch.equal(read["y"], X.bfloat16())


def test_random_numbers_are_the_devices_own() -> None:
    torch.manual_seed(3)
    first, here = torch.rand(4, device="sim"), torch.rand(4)
    torch.manual_seed(3)
    torch.rand(4)  # does not move the device's
    assert torch.equal(torch.rand(4, device="sim").cpu(), first.cpu())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), here)
    generator = torch.Generator("sim").manual_seed(5)
    assert isinstance(generator, torch.Generator) and generator.device.type == "sim"
    drawn = torch.empty(4, device="sim").normal_(generator=generator)
    again = torch.Generator("sim").manual_seed(5)
    assert torch.equal(torch.empty(4, device="sim").normal_(generator=again).cpu(), drawn.cpu())


def test_autocast_lowers_products_and_keeps_losses_in_float32() -> None:
    layer, x = nn.Linear(4, 2).to("sim"), sim().requires_grad_()
    with torch.autocast("sim", torch.bfloat16):
        y = layer(x)
        loss = F.cross_entropy(y, torch.zeros(3, dtype=torch.long, device="sim"))
    assert y.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_inference_mode_takes_operators_apart() -> None:
    layer = nn.Linear(4, 2).to("sim")
    with torch.inference_mode():
        y = layer(sim()).reshape(6)
        assert y.device.type == "sim" and y.to("cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="device"):
            layer(X)


def test_bytes_are_counted_once_per_storage_and_leave_with_it() -> None:
    before = live_bytes()
    x = torch.zeros(1000, device="sim")
    y, z = x[10:], x.view(10, 100).T
    assert live_bytes() - before == 4000
    del x, y
    assert live_bytes() - before == 4000 and z.shape == (100, 10)
    del z
    assert live_bytes() == before
    other = torch.zeros(7, device="sim:1")
    assert live_bytes() == before and live_bytes("sim:1") >= 28 and other.numel() == 7


def test_the_peak_is_what_was_live_at_once() -> None:
    before = live_bytes()
    reset_peak()
    x = torch.zeros(1000, device="sim")
    y = x + 1
    del x, y
    torch.zeros(1000, device="sim")
    assert peak_bytes() - before == 8000
    reset_peak()
    assert peak_bytes() == live_bytes() == before


def test_tensors_that_the_backward_pass_keeps_are_counted() -> None:
    before = live_bytes()
    x = torch.zeros(1000, device="sim", requires_grad=True)
    y = (x + 1).exp().sum()  # keeps the exponentials
    assert live_bytes() - before == 8004
    del y
    assert live_bytes() - before == 4000


def test_a_full_card_says_so() -> None:
    with memory_of(live_bytes() + 5000):
        x = torch.zeros(1000, device="sim")
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            x + 1
        assert torch.get_device_module("sim").mem_get_info()[0] == 1000
    assert float((x + 1).sum()) == 1000


def test_reading_a_value_counts_as_waiting_for_the_card() -> None:
    x = sim()
    before = n_syncs()
    y = (x @ x.T).sum()
    assert n_syncs() == before
    y.item()
    x.cpu()
    bool(y > 0)
    assert n_syncs() == before + 3
