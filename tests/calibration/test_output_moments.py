"""Output moments equal plain autograd, and with them errors predict the KL they cause."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import (
    kfac_loss,
    load_moments,
    output_moments,
    token_losses,
)
from hf_evopress.models.units import find_units


def all_moments(folder, model):
    blocks = {u.block for u in find_units(model)}
    return {name: G for i in sorted(blocks) for name, G in load_moments(folder, i).items()}


def plain_gradients(model, tokens, seed):
    """Return (x, g) (n_tokens, ...) of every unit from one full graph per sequence."""
    generator = torch.Generator().manual_seed(seed)
    found = {u.name: ([], []) for u in find_units(model)}
    for row in tokens:
        outputs = {}
        hooks = [
            model.get_submodule(n).register_forward_hook(
                lambda _, args, y, n=n, to=outputs: to.update({n: (args[0], y)})
            )
            for n in found
        ]
        model.requires_grad_(True)
        logits = model(row[None]).logits[0]
        labels = torch.multinomial(logits.softmax(-1).detach(), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [y for _, y in outputs.values()])
        model.requires_grad_(False)
        for hook in hooks:
            hook.remove()
        for (name, (x, _)), g in zip(outputs.items(), gradients, strict=True):
            found[name][0].append(x.detach().flatten(0, -2))
            found[name][1].append(g.flatten(0, -2))
    return {n: (torch.cat(x), torch.cat(g)) for n, (x, g) in found.items()}


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "phi3", "gpt_neox", "opt"])
def test_moments_equal_plain_autograd(arch, tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(arch), text_tokens(3, 16)
    output_moments(model, tokens, tmp_path, seed=5, batch_tokens=32)
    moments = all_moments(tmp_path, model)
    for name, (_, g) in plain_gradients(model, tokens, 5).items():
        expected = g.T @ g / len(g)
        scale = float(expected.abs().max())
        torch.testing.assert_close(moments[name], expected, rtol=1e-3, atol=1e-4 * scale)


def test_moments_do_not_depend_on_the_batch_size(tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(), text_tokens(4, 16)
    output_moments(model, tokens, tmp_path / "a", batch_tokens=16)
    output_moments(model, tokens, tmp_path / "b", batch_tokens=64)
    other = all_moments(tmp_path / "b", model)
    for name, G in all_moments(tmp_path / "a", model).items():
        torch.testing.assert_close(G, other[name], rtol=1e-3, atol=1e-5 * float(G.abs().max()))


def test_weights_get_no_gradients_and_keep_their_flags(tiny_model, text_tokens, tmp_path):
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    output_moments(model, text_tokens(2, 16), tmp_path)
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_only_one_block_has_a_graph(tiny_model, text_tokens, tmp_path):
    model = tiny_model(num_hidden_layers=4)
    under_grad = []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(
            lambda _, args, out, i=i: under_grad.append(i) if out.requires_grad else None
        )
        block.register_forward_pre_hook(
            lambda _, args: pytest.fail("the graph spans blocks") if args[0].grad_fn else None
        )
    output_moments(model, text_tokens(2, 16), tmp_path)
    assert under_grad == [3, 2, 1, 0]


def test_no_scratch_files_are_left(tiny_model, text_tokens, tmp_path):
    root = output_moments(tiny_model(), text_tokens(2, 16), tmp_path)
    names = sorted(p.name for p in root.iterdir())
    assert names == ["block_00000.safetensors", "block_00001.safetensors", "index.json"]


def test_a_killed_run_resumes_with_the_same_numbers(tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(num_hidden_layers=3), text_tokens(2, 16)
    output_moments(model, tokens, tmp_path / "whole")

    def killed(label, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output_moments(model, tokens, tmp_path / "part", progress=killed)
    assert len(list((tmp_path / "part" / "moments").iterdir())) == 3  # two blocks and the index
    output_moments(model, tokens, tmp_path / "part")
    other = all_moments(tmp_path / "part", model)
    assert all(torch.equal(G, other[n]) for n, G in all_moments(tmp_path / "whole", model).items())


def test_another_seed_in_the_same_folder_is_refused(tiny_model, text_tokens, tmp_path):
    output_moments(tiny_model(), text_tokens(2, 16), tmp_path, seed=0)
    with pytest.raises(ValueError, match=r"seed \(0 there, 1 now\)"):
        output_moments(tiny_model(), text_tokens(2, 16), tmp_path, seed=1)


def test_bfloat16_models_have_float32_moments(tiny_model, text_tokens, tmp_path):
    model = tiny_model().bfloat16()
    output_moments(model, text_tokens(2, 16), tmp_path)
    assert all(G.dtype == torch.float32 for G in all_moments(tmp_path, model).values())


def test_missing_moments_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run output_moments first"):
        load_moments(tmp_path, 0)


def test_kfac_loss_is_the_trace_formula():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(3, 5, generator=generator)
    A, B = torch.randn(5, 5, generator=generator), torch.randn(3, 3, generator=generator)
    H, G = A @ A.T, B @ B.T
    expected = 0.5 * torch.trace(G @ delta @ H @ delta.T)
    assert kfac_loss(delta, H, G) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def kl_per_token(dense_logits, model, tokens):
    p, q = dense_logits.log_softmax(-1), model(tokens).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_kfac_predicts_the_kl_of_single_unit_errors(trained_llama, text_tokens, tmp_path):
    model = copy.deepcopy(trained_llama)
    tokens, fresh = text_tokens(24, 64, seed=2), text_tokens(12, 64, seed=3)
    calibrate(model, tokens, tmp_path)
    output_moments(model, tokens, tmp_path)
    moments = all_moments(tmp_path, model)
    dense = model(fresh).logits.detach()
    predicted, true = [], []
    for unit in find_units(model):
        weight = model.get_submodule(unit.name).weight
        kept = weight.data.clone()
        gram = load_stats(tmp_path, unit.block)[unit.name].gram
        for step in (0.03, 0.1):  # rounding to a grid of this many mean absolute weights
            grid = step * 10 * kept.abs().mean()
            weight.data = (kept / grid).round() * grid
            predicted.append(kfac_loss(weight.data - kept, gram, moments[unit.name]))
            true.append(kl_per_token(dense, model, fresh))
            weight.data = kept
    predicted, true = torch.tensor(predicted), torch.tensor(true)
    assert spearman(predicted, true) > 0.85
    assert 0.5 < float(predicted.sum() / true.sum()) < 2


def spearman(a, b):
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_token_losses_equal_plain_autograd_and_split_by_position(tiny_model, text_tokens):
    model, tokens = tiny_model(), text_tokens(3, 16)
    generator = torch.Generator().manual_seed(1)
    deltas = {
        u.name: 0.01 * torch.randn(u.shape, generator=generator)
        for u in find_units(model)
        if u.name.endswith(("v_proj", "down_proj"))
    }
    found = token_losses(model, tokens, deltas, seed=4, batch_tokens=32)
    plain = plain_gradients(model, tokens, 4)
    assert found.keys() == deltas.keys()
    for name, delta in deltas.items():
        x, g = plain[name]
        loss = 0.5 * (g * (x @ delta.T)).sum(-1).square().view(3, 16)
        assert found[name].first == pytest.approx(float(loss[:, 0].sum() / 48), rel=1e-3)
        assert found[name].total == pytest.approx(float(loss.mean()), rel=1e-3)


def test_token_losses_of_an_unknown_unit_are_refused(tiny_model, text_tokens):
    with pytest.raises(ValueError, match="no unit 'nope'"):
        token_losses(tiny_model(), text_tokens(2, 16), {"nope": torch.zeros(2, 2)})
