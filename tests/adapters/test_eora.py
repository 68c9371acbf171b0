"""EoRA adapters: closer to the dense model, within their bytes, readable by stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_evopress.adapters.eora import Walk, eora, shared_units
from hf_evopress.adapters.eora_ranks import ErrorCurve, ranks_for_size
from hf_evopress.adapters.folder import load_adapter, read_adapter, write_adapter
from hf_evopress.adapters.foreign import dense_weight
from hf_evopress.adapters.kappa import kappa_targets
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods.maths.metric import Metric
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.scoring.fitness.kl import KL

LEVEL = "rtn:bits=3,group_size=64,clip=false"


@pytest.fixture(scope="module")
def dense(trained_llama: Any) -> Any:
    return copy.deepcopy(trained_llama)


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(24, 64)


@pytest.fixture(scope="module")
def unseen(text_tokens: Any) -> Tensor:
    return text_tokens(6, 64, seed=9)


@pytest.fixture(scope="module")
def compressed(dense: Any, tokens: Tensor) -> Any:
    model = copy.deepcopy(dense)
    plan = Plan({u.name: LEVEL for u in find_units(model)}, shapes=shapes(model))
    compress_model(model, plan, tokens)
    attach(model, plan)
    return model


def shapes(model: Any) -> dict[str, Any]:
    return {u.name: u.shape for u in find_units(model)}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def kl(dense: Any, model: Any, ids: Tensor) -> float:
    fitness = KL(top_k=0)
    losses = []
    for row in ids:
        targets = fitness.targets(logits(dense, row[None])[0], row)
        losses.append(fitness.loss(logits(model, row[None])[0], row, targets))
    return sum(losses) / len(losses)


def repaired(compressed: Any, folder: Path) -> Any:
    return load_adapter(copy.deepcopy(compressed), folder)


def test_an_adapter_brings_the_model_closer_to_the_dense_one(
    dense: Any, compressed: Any, tokens: Tensor, unseen: Tensor, tmp_path: Path
) -> None:
    losses = [kl(dense, compressed, unseen)]
    for rank in (4, 16):
        folder = eora(compressed, dense, tokens, tmp_path / str(rank), rank=rank)
        losses.append(kl(dense, repaired(compressed, folder), unseen))
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("prefix", [False, True])
def test_at_full_rank_nothing_of_the_error_is_left(
    dense: Any, compressed: Any, tokens: Tensor, unseen: Tensor, tmp_path: Path, prefix: bool
) -> None:
    eora(compressed, dense, tokens, tmp_path, rank=64, dtype="float16", prefix=prefix)
    before = kl(dense, compressed, unseen)
    assert kl(dense, repaired(compressed, tmp_path), unseen) < 1e-4 * before + 1e-6


def test_stock_peft_on_the_dequantized_model_gives_the_same_logits(
    dense: Any, compressed: Any, tokens: Tensor, unseen: Tensor, tmp_path: Path
) -> None:
    eora(compressed, dense, tokens, tmp_path, rank=8)
    ours = logits(repaired(compressed, tmp_path), unseen)
    stock = PeftModel.from_pretrained(copy.deepcopy(compressed).dequantize(), tmp_path)
    assert torch.allclose(logits(stock, unseen), ours, atol=1e-4)


def test_ranks_are_nested(dense: Any, compressed: Any, tokens: Tensor) -> None:
    walk = Walk(compressed, dense, tokens)
    small, large = (walk.factors(lambda name, r, n=n: n) for n in (4, 16))
    name = "model.layers.0.self_attn.q_proj"  # later blocks see inputs that are repaired more
    assert torch.equal(small[name][0], large[name][0][:4])
    assert torch.equal(small[name][1], large[name][1][:, :4])


def test_it_leaves_less_output_error_than_plain_svd_of_the_same_rank(
    dense: Any, compressed: Any, tokens: Tensor
) -> None:
    walk = Walk(compressed, dense, tokens)
    for _, residuals, _ in walk._blocks("test"):
        for residual in residuals.values():
            H, delta = residual.stats.hessian().double(), residual.delta.double()
            U = Metric(None, metric="plain").basis(delta)[1][:, :8]
            left = delta - U @ (U.T @ delta)
            assert residual.curve(0.05).squared[8] <= float(((left @ H) * left).sum()) * 1.0001
        break


def test_the_error_target_is_met_by_every_layer(
    dense: Any, compressed: Any, tokens: Tensor, tmp_path: Path
) -> None:
    eora(compressed, dense, tokens, tmp_path, error=0.01)
    ranks = read_adapter(tmp_path).ranks
    curves = Walk(compressed, dense, tokens).curves()
    name = "model.layers.0.mlp.up_proj"
    rank = ranks[name]
    assert curves[name].squared[rank] <= 0.01 * curves[name].output < curves[name].squared[rank - 1]
    assert len(set(ranks.values())) > 1


def test_a_size_is_kept_and_used(
    dense: Any, compressed: Any, tokens: Tensor, unseen: Tensor, tmp_path: Path
) -> None:
    eora(compressed, dense, tokens, tmp_path, size="30kB")
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 25_000 < written <= 30_000
    assert kl(dense, repaired(compressed, tmp_path), unseen) < kl(dense, compressed, unseen)


def test_chosen_ranks_leave_less_predicted_loss_than_a_uniform_rank_of_the_same_bytes(
    dense: Any, compressed: Any, tokens: Tensor, tmp_path: Path
) -> None:
    output_moments(dense, tokens[:8], tmp_path)
    curves = Walk(compressed, dense, tokens).curves(lambda block: load_moments(tmp_path, block))
    from hf_evopress.adapters.folder import adapter_bytes

    size = adapter_bytes({n: c.shape for n, c in curves.items()}, dict.fromkeys(curves, 8))
    ranks = ranks_for_size(curves, size)
    chosen = sum(float(curves[n].left[r]) for n, r in ranks.items())
    uniform = sum(float(c.left[8]) for c in curves.values())
    assert chosen < 0.95 * uniform
    assert len(set(ranks.values())) > 1


def test_moments_weigh_each_component_by_what_it_costs() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(6, 9, generator=generator).double()
    root = torch.randn(6, 6, generator=generator).double()
    G = root @ root.T
    values, U = Metric(None, metric="plain").basis(delta)
    curve = ErrorCurve.of((6, 9), values, U, 1.0, G)
    for rank in (0, 2, 6):
        left = delta - U[:, :rank] @ (U[:, :rank].T @ delta)
        assert float(curve.left[rank]) == pytest.approx(
            0.5 * float(torch.trace(G @ left @ left.T)), abs=1e-9
        )


class Int8Linear(nn.Module):
    """A quantised layer of another library: no dense weight anywhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("codes", (linear.weight.detach() / scale).round().char())
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.codes * self.scale).to(x.dtype), self.bias)


def test_any_quantised_layer_is_read_through_its_answers() -> None:
    linear = nn.Linear(16, 8)
    other = Int8Linear(linear)
    W = dense_weight(other, (8, 16), torch.float32)
    assert torch.allclose(W, other.codes * other.scale, atol=1e-6)
    with pytest.raises(ValueError, match="no linear layer"):
        dense_weight(other, (9, 16), torch.float32)


def test_models_quantised_by_others_are_repaired_too(
    dense: Any, tokens: Tensor, unseen: Tensor, tmp_path: Path
) -> None:
    other = copy.deepcopy(dense)
    for unit in find_units(dense):
        other.set_submodule(unit.name, Int8Linear(other.get_submodule(unit.name)))
    eora(other, dense, tokens, tmp_path, rank=8)
    read = read_adapter(tmp_path)
    assert len(read.ranks) == len(find_units(dense))
    stock = copy.deepcopy(dense)
    for unit in find_units(dense):
        module = other.get_submodule(unit.name)
        stock.get_submodule(unit.name).weight.data = module.codes * module.scale
    fixed = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path)
    assert kl(dense, fixed, unseen) < 0.8 * kl(dense, stock, unseen)


def test_layers_without_error_get_no_factors(dense: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(dense)
    levels = {u.name: LEVEL if "q_proj" in u.name else "dense" for u in find_units(model)}
    plan = Plan(levels, shapes=shapes(model))
    compress_model(model, plan, tokens)
    attach(model, plan)
    eora(model, dense, tokens, tmp_path, rank=2)
    assert all("q_proj" in name for name in read_adapter(tmp_path).ranks)


def test_the_adapter_of_other_packed_weights_is_refused(
    dense: Any, compressed: Any, tokens: Tensor, tmp_path: Path
) -> None:
    eora(compressed, dense, tokens, tmp_path, rank=2)
    other = copy.deepcopy(dense)
    plan = Plan(dict.fromkeys(shapes(other), "rtn:bits=4,group_size=64"), shapes=shapes(other))
    compress_model(other, plan, tokens)
    with pytest.raises(ValueError, match=r"other packed weights.*hf-evopress adapt"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "by rank, size or error; got {}"),
        ({"rank": 2, "size": "1MB"}, "by rank, size or error"),
        ({"rank": 0}, "1 or more, got 0"),
        ({"error": 1.5}, "1.5"),
        ({"size": "2 apples"}, "not a size"),
        ({"size": "900B"}, "holds nothing: the smallest"),
        ({"rank": 2, "dtype": "int8"}, "bfloat16.*'int8'"),
    ],
)
def test_bad_requests_say_what_to_change(
    dense: Any, compressed: Any, tokens: Tensor, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        eora(compressed, dense, tokens[:2], tmp_path, **options)


def test_a_dense_model_of_another_shape_is_refused(
    compressed: Any, tokens: Tensor, tiny_model: Any, tmp_path: Path
) -> None:
    other = tiny_model(num_hidden_layers=3, intermediate_size=96)
    with pytest.raises(ValueError, match=r"is \(128, 64\) in the compressed model"):
        eora(compressed, other, tokens, tmp_path, rank=2)
    compressed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model"):
        eora(compressed, other, tokens, tmp_path, rank=2)


def test_writing_is_refused_without_factors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no factors"):
        write_adapter(tmp_path, {})


def test_a_layer_that_peft_refuses_gets_no_adapter() -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    config = AutoConfig.for_model("mamba2", vocab_size=32, num_hidden_layers=1, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    one, other = (unit.name for unit in find_units(model))
    with pytest.raises(ValueError, match="'out_proj' is incompatible"):
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=[other]))
    assert [unit.name for unit in shared_units(model, model)] == [one]
    assert kappa_targets(model, 1.0) == [one]
