"""Learned masks of KV groups and channels under Trainer, and the smaller model they leave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainingArguments

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
    state: Any = type("State", (), {"max_steps": 12, "global_step": 3})
    with pytest.raises(ValueError, match="start the run anew"):
        pruning.on_train_begin(None, state, None, model=model)
