"""Calibration gives the moments of what the linears really see, block by block."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open

from hf_evopress.calibration import input_moments as calibration
from hf_evopress.calibration.input_moments import calibrate, first_tokens, load_stats
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.units import find_units


def all_stats(folder, model) -> dict[str, Stats]:
    blocks = {u.block for u in find_units(model)}
    return {name: s for i in sorted(blocks) for name, s in load_stats(folder, i).items()}


@torch.no_grad()
def direct_inputs(model, tokens) -> dict[str, torch.Tensor]:
    """Return the inputs (n_tokens, in) of every unit from one plain forward per sequence."""
    seen: dict[str, list[torch.Tensor]] = {u.name: [] for u in find_units(model)}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2))
        )
        for n in seen
    ]
    for row in tokens:
        model(row[None])
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(x) for n, x in seen.items()}


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "phi3", "gpt_neox", "opt"])
def test_moments_equal_those_of_a_plain_forward(arch, tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(arch), text_tokens(5, 16)
    calibrate(model, tokens, tmp_path, batch_tokens=32, accumulate=torch.float64)
    stats = all_stats(tmp_path, model)
    assert stats.keys() == {u.name for u in find_units(model)}
    for name, X in direct_inputs(model, tokens).items():
        torch.testing.assert_close(stats[name].gram, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats[name].mean, X.mean(0), rtol=1e-4, atol=1e-5)
        assert stats[name].n_tokens == len(X) == 80


def test_the_sink_moment_is_that_of_position_zero(tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(), text_tokens(6, 16)
    calibrate(model, tokens, tmp_path, n_sink=4)
    firsts = first_tokens(tokens, 4)
    long = tokens[:4].clone()
    long[:, 0] = firsts
    inputs = direct_inputs(model, long)
    for name, stats in all_stats(tmp_path, model).items():
        X = inputs[name].view(4, 16, -1)[:, 0]  # position 0 inside longer sequences
        torch.testing.assert_close(stats.sink, X.T @ X / 4, rtol=1e-4, atol=1e-5)


def test_a_prefix_gives_the_sink_moment_of_all_its_positions(tiny_model, text_tokens, tmp_path):
    model = tiny_model()
    prefix = [7, 8, 9]
    calibrate(model, text_tokens(2, 16), tmp_path, prefix=prefix)
    inputs = direct_inputs(model, torch.tensor([prefix]))
    for name, stats in all_stats(tmp_path, model).items():
        torch.testing.assert_close(
            stats.sink, inputs[name].T @ inputs[name] / 3, rtol=1e-4, atol=1e-5
        )


def test_held_out_text_gives_a_second_gram(tiny_model, text_tokens, tmp_path):
    model, other = tiny_model(), text_tokens(2, 16, seed=9)
    calibrate(model, text_tokens(2, 16), tmp_path, heldout_tokens=other)
    inputs = direct_inputs(model, other)
    for name, stats in all_stats(tmp_path, model).items():
        X = inputs[name]
        torch.testing.assert_close(stats.heldout, X.T @ X / len(X), rtol=1e-4, atol=1e-5)


def test_without_held_out_text_or_sink_there_are_none(tiny_model, text_tokens, tmp_path):
    model = tiny_model()
    calibrate(model, text_tokens(2, 16), tmp_path, n_sink=0)
    assert all(s.heldout is None and s.sink is None for s in all_stats(tmp_path, model).values())


def test_units_with_one_input_share_one_stats(tiny_model, text_tokens, tmp_path):
    calibrate(tiny_model(), text_tokens(2, 16), tmp_path)
    stats = load_stats(tmp_path, 0)
    block = "model.layers.0."
    q, k, v = (stats[f"{block}self_attn.{p}_proj"] for p in "qkv")
    assert q is k is v
    assert stats[f"{block}mlp.gate_proj"] is stats[f"{block}mlp.up_proj"]
    assert len({id(s) for s in stats.values()}) == 4


def test_wide_inputs_are_summed_in_strips_without_a_difference():
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    moment = calibration.Moment(x, torch.float32)
    moment.add(x)
    moment.add(2 * x)
    torch.testing.assert_close(moment.gram(), 5 * (x.T @ x) / 128, rtol=1e-4, atol=1e-5)
    assert torch.equal(moment.gram(), moment.gram().T)


def test_a_killed_run_resumes_with_the_same_bytes(tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(num_hidden_layers=3), text_tokens(3, 16)
    whole = calibrate(model, tokens, tmp_path / "whole", batch_tokens=32)

    def killed(label, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tokens, tmp_path / "part", batch_tokens=32, progress=killed)
    part = tmp_path / "part" / "stats"
    assert len(list(part.glob("*.safetensors"))) == 2
    first = os.stat(part / "block_00000.safetensors").st_mtime_ns
    calibrate(model, tokens, tmp_path / "part", batch_tokens=32)
    assert os.stat(part / "block_00000.safetensors").st_mtime_ns == first
    for i in range(3):
        name = f"block_{i:05d}.safetensors"
        with safe_open(whole / name, "pt") as a, safe_open(part / name, "pt") as b:
            assert all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in list(a.keys()))


def test_a_finished_folder_runs_no_model(tiny_model, text_tokens, tmp_path):
    model, tokens = tiny_model(), text_tokens(2, 16)
    calibrate(model, tokens, tmp_path)
    model.forward = None
    calibrate(model, tokens, tmp_path)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"tokens": True}, "tokens"),
        ({"model": True}, "model"),
        ({"accumulate": torch.float64}, r"accumulate \(float32 there, float64 now\)"),
        ({"prefix": [1, 2]}, "first tokens"),
    ],
)
def test_a_changed_setting_is_refused_by_name(change, word, tiny_model, text_tokens, tmp_path):
    calibrate(tiny_model(), text_tokens(2, 16), tmp_path)
    model = tiny_model(seed=1 if change.pop("model", False) else 0)
    tokens = text_tokens(2, 16, seed=2 if change.pop("tokens", False) else 1)
    with pytest.raises(ValueError, match=word):
        calibrate(model, tokens, tmp_path, **change)


def test_progress_is_told_once_per_block(tiny_model, text_tokens, tmp_path):
    told = []
    calibrate(
        tiny_model(), text_tokens(2, 16), tmp_path, progress=lambda *event: told.append(event)
    )
    assert told == [("calibration", 1, 2), ("calibration", 2, 2)]


def test_only_the_units_asked_for_are_calibrated(tiny_model, text_tokens, tmp_path):
    model = tiny_model()
    units = find_units(model, skip=["model.layers.1.*", "*.mlp.*"])
    calibrate(model, text_tokens(2, 16), tmp_path, units=units)
    assert load_stats(tmp_path, 0).keys() == {u.name for u in units}
    with pytest.raises(FileNotFoundError, match="run calibrate first"):
        load_stats(tmp_path, 1)


def test_tokens_of_another_tokenizer_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="the model has 256 embeddings"):
        calibrate(tiny_model(), torch.full((2, 8), 999), tmp_path)
    with pytest.raises(ValueError, match="LongTensor"):
        calibrate(tiny_model(), torch.zeros(8, dtype=torch.long), tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_in_the_activations_is_an_error_that_names_the_unit(tiny_model, text_tokens, tmp_path):
    model = tiny_model()
    model.model.layers[1].self_attn.v_proj.weight.data[0].fill_(float("inf"))
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.* inf or NaN"):
        calibrate(model, text_tokens(2, 16), tmp_path)
    assert load_stats(tmp_path, 0)


def test_with_bos_only_bos_is_a_first_token():
    tokens = torch.tensor([[1, 5, 6], [1, 7, 8]])
    assert first_tokens(tokens, 64).tolist() == [1]


def test_first_tokens_come_by_frequency_and_are_topped_up_from_the_text():
    tokens = torch.tensor([[4, 9, 9], [3, 9, 2], [3, 9, 2]])
    assert first_tokens(tokens, 2).tolist() == [3, 4]
    assert first_tokens(tokens, 3).tolist() == [3, 4, 9]
    assert sorted(first_tokens(tokens, 64).tolist()) == [2, 3, 4, 9]
