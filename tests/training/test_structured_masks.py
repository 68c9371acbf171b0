"""Learned masks of KV groups and channels under Trainer, and the smaller model they leave."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from hf_evopress import StructuredPruning
from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.structured_masks import Gates, slice_model
from hf_evopress.training.trainer import DistillationTrainer


def trainer_of(
    model: Any, dense: Any, tokens: Tensor, out: Path, callbacks: list[Any], **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "report_to": "none",
        "logging_steps": 100,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return DistillationTrainer(
        model,
        TrainingArguments(output_dir=str(out), **{**settings, **changes}),
        train_dataset=Sequences(tokens),
        eval_dataset=Sequences(tokens[:8]),
        teacher=dense,
        callbacks=callbacks,
    )


def with_lora(dense: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(copy.deepcopy(dense), LoraConfig(r=4, target_modules="all-linear"))


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


def test_the_sliced_model_is_the_masked_one_and_any_transformers_loads_it(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = with_lora(trained_llama)
    pruning = StructuredPruning(kv_groups=1, channels=96)
    trainer_of(model, trained_llama, tokens, tmp_path, [pruning], max_steps=8).train()
    with torch.no_grad():
        masked = model.eval()(input_ids=tokens[:2], use_cache=False).logits
    small = slice_model(model.merge_and_unload(), pruning)
    small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        sliced = loaded(input_ids=tokens[:2], use_cache=False).logits
        text = loaded.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False)
    assert float((masked - sliced).abs().max()) < 1e-5 * float(masked.abs().max())
    assert type(loaded).__module__.startswith("transformers.") and text.shape == (1, 12)
    config = loaded.config
    assert (config.num_key_value_heads, config.num_attention_heads) == (1, 2)
    assert config.intermediate_size == 96 and config.head_dim == 16
    files = [f.stat().st_size for f in (tmp_path / "small").glob("*.safetensors")]
    inside = sum(4 * p.numel() for p in trained_llama.model.layers.parameters())
    assert sum(files) < 4 * sum(p.numel() for p in trained_llama.parameters()) - 0.2 * inside


def test_learned_masks_are_better_to_train_with_than_random_ones_and_their_opposite(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    learned = StructuredPruning(channels=64)
    trainer_of(with_lora(trained_llama), trained_llama, tokens, tmp_path, [learned]).train()
    alpha = learned.gates["channels"].log_alpha.detach()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for scores in (alpha, torch.rand(alpha.shape, generator=generator), -alpha):
        model = with_lora(trained_llama)
        pruning = StructuredPruning(channels=64)
        pruning.install(model)
        pruning.gates["channels"].log_alpha.data.copy_(scores)
        pruning.gates["channels"].harden()
        trainer = trainer_of(model, trained_llama, tokens, tmp_path, [], max_steps=8)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
        assert pruning.gates["channels"].mask.sum(1).tolist() == [64.0] * 3
    assert losses[0] < losses[1] < losses[2]


def saving_run(
    dense: Any, tokens: Tensor, out: Path, stopped: str | None = None
) -> tuple[StructuredPruning, Any]:
    """A run of 16 steps that saves every fifth; its callback and model. stopped: go on there."""
    model, pruning = with_lora(dense), StructuredPruning(kv_groups=1, channels=96, end=10)
    settings = {"max_steps": 16, "save_strategy": "steps", "save_steps": 5, "logging_steps": 1}
    trainer = trainer_of(model, dense, tokens, out, [pruning], **settings)
    trainer.train(resume_from_checkpoint=stopped and str(out / stopped))
    return pruning, model


@pytest.fixture(scope="module")
def straight(trained_llama: Any, tokens: Tensor, tmp_path_factory: Any) -> Any:
    """A straight run: its folder, callback and model."""
    out = tmp_path_factory.mktemp("straight")
    return out, *saving_run(trained_llama, tokens, out)


@pytest.mark.parametrize("step", [5, 10, 15])  # gates that learn, are about to be fixed, are fixed
def test_a_resumed_run_equals_a_straight_one(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, straight: Any, step: int
) -> None:
    folder, pruning, model = straight
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    other, again = saving_run(trained_llama, tokens, tmp_path, f"checkpoint-{step}")
    weights = again.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    for kind, gates in pruning.gates.items():
        state = other.gates[kind].state()
        assert {"mask", "adam.exp_avg_sq"} <= state.keys()
        assert all(torch.equal(t, state[name]) for name, t in gates.state().items())
        assert gates.mask is not None and 0 < float(gates.mask.mean()) < 1
    start = with_lora(trained_llama).state_dict()
    assert any(not torch.equal(t, start[name]) for name, t in weights.items())


def test_only_the_gates_of_the_run_that_is_resumed_are_read(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, straight: Any
) -> None:
    file = straight[0] / "checkpoint-5" / "structured_pruning_kv_channels.safetensors"
    state = TrainerState.load_from_json(str(file.parent / "trainer_state.json"))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(
        ValueError, match="of step 5 of this run is not in .*resume_from_checkpoint"
    ):
        pruning_at(args, state, trained_llama)
    args.resume_from_checkpoint = str(file.parent)
    resumed = pruning_at(args, state, trained_llama)
    adam = {name: gates.state()["adam.step"] for name, gates in resumed.gates.items()}
    assert adam == {"kv": 5.0, "channels": 5.0}
    with pytest.raises(ValueError, match="'channels': 96}, this run has .*'channels': 64}"):
        pruning_at(args, state, trained_llama, channels=64)
    state.log_history[0]["loss"] += 1.0  # of a run with other losses
    with pytest.raises(ValueError, match="of step 5 of this run is not in"):
        pruning_at(args, state, trained_llama)
    state.log_history[0]["loss"] -= 1.0
    damaged = tmp_path / "checkpoint-5" / file.name
    damaged.parent.mkdir()
    damaged.write_bytes(file.read_bytes()[:200])
    args.resume_from_checkpoint = None
    with pytest.raises(ValueError, match="damaged .*resume from an earlier checkpoint"):
        pruning_at(args, state, trained_llama)


def pruning_at(args: Any, state: Any, dense: Any, channels: int = 96) -> StructuredPruning:
    pruning = StructuredPruning(kv_groups=1, channels=channels)
    pruning.on_train_begin(args, state, None, model=with_lora(dense))
    return pruning


def test_the_best_model_has_the_gates_of_its_step(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, pruning = with_lora(trained_llama), StructuredPruning(channels=96, end=6)
    options: dict[str, Any] = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    options |= {"eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    trainer = trainer_of(model, trained_llama, tokens, tmp_path, [pruning], max_steps=12, **options)
    trainer.train()
    best = trainer.state.best_global_step
    assert best == 4  # few gates have closed yet
    kept = load_file(tmp_path / f"checkpoint-{best}" / "structured_pruning_channels.safetensors")
    state = pruning.gates["channels"].state()
    assert torch.equal(state["log_alpha"], kept["channels/log_alpha"])
    last = load_file(tmp_path / "checkpoint-12" / "structured_pruning_channels.safetensors")
    assert not torch.equal(state["adam.exp_avg"], last["channels/adam.exp_avg"])
    assert "step 4, before its gates were fixed (after step 6)" in caplog.text
    small = slice_model(model.merge_and_unload(), pruning)
    assert small.config.intermediate_size == 96


def test_a_second_training_with_the_same_callback_gates_once(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    pruning, weights = StructuredPruning(channels=96), []
    for _ in range(2):
        model = with_lora(trained_llama)
        trainer_of(model, trained_llama, tokens, tmp_path, [pruning], max_steps=4).train()
        weights.append(model.state_dict())
    assert len(pruning._hooks) == 3
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())


def test_the_penalty_brings_the_expected_sparsity_to_its_target() -> None:
    gates = Gates(2, 40, 25, 0.1, "cpu")
    push = torch.linspace(-0.02, 0.02, 40)
    for step in range(400):
        gates.draw(torch.Generator().manual_seed(step))
        loss = sum((gates.values(b, True) * push).sum() for b in range(2))
        loss.backward()
        gates.learn(1.0, 1.0)
    assert gates.expected_sparsity().tolist() == pytest.approx([15 / 40] * 2, abs=0.03)
    gates.harden()
    kept = gates.mask[0].bool()
    assert int(kept.sum()) == 25 and push[kept].mean() < push[~kept].mean()


def test_bad_requests_say_what_to_change(
    trained_llama: Any, tiny_model: Any, tokens: Tensor
) -> None:
    with pytest.raises(ValueError, match="kv_groups=None, channels=None"):
        StructuredPruning()
    with pytest.raises(ValueError, match="warmup=0"):
        StructuredPruning(channels=4, warmup=0)
    with pytest.raises(ValueError, match="a block has 2 kv, fewer than the 3"):
        StructuredPruning(kv_groups=3).install(copy.deepcopy(trained_llama))
    with pytest.raises(ValueError, match="OPTForCausalLM have no self_attn.o_proj"):
        StructuredPruning(kv_groups=1).install(tiny_model("opt"))
    pruning = StructuredPruning(kv_groups=1)
    with pytest.raises(ValueError, match="train with the callback first"):
        slice_model(copy.deepcopy(trained_llama), pruning)
    model = with_lora(trained_llama)
    pruning.install(model)
    pruning.gates["kv"].harden()
    with pytest.raises(ValueError, match="merge_and_unload"):
        slice_model(model, pruning)
