"""Training compressed models: adapters, float parameters, distillation, resuming."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_evopress.loading.layers import compressed_linears
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.distillation import Sequences, Targets, precompute_targets
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.training.trainer import Distillation, DistillationTrainer
from hf_evopress.training.tunable import make_tunable, settle

from . import short_runs

LEVEL = "rtn:bits=3,group_size=32,clip=false"


@pytest.fixture(scope="module")
def dense(trained_llama: Any) -> Any:
    return copy.deepcopy(trained_llama)


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(48, 48)


@pytest.fixture(scope="module")
def folder(dense: Any, tokens: Tensor, write_model: Any, tmp_path_factory: Any) -> Path:
    """A compressed checkpoint, as a user has it."""
    place = tmp_path_factory.mktemp("compressed")
    return write_model(place, dense, LEVEL, tokens=tokens) / "small"


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    own = {"max_steps": 8, "learning_rate": 5e-3, "dataloader_pin_memory": False}
    return short_runs.arguments(out, **{**own, **changes})


def with_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def kl(dense: Any, model: Any, ids: Tensor) -> float:
    fitness, total = KL(top_k=0), 0.0
    model.eval()
    for row in ids:
        with torch.no_grad():
            p, q = (m(input_ids=row[None], use_cache=False).logits[0] for m in (dense, model))
        total += fitness.loss(q, row, fitness.targets(p, row))
    return total / len(ids)


def trained(made: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in made.named_parameters() if p.requires_grad}


def test_lora_trains_and_leaves_the_packed_model_as_it_was(
    model: Any, text_tokens: Any, tmp_path: Path
) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made = with_lora(model)
    other = Sequences((text_tokens(32, 48, seed=7) + 1) % 256)  # a language it has not seen
    trainer = Trainer(made, arguments(tmp_path), train_dataset=other)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.2
    after = made.unload().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_gradient_checkpointing_changes_no_gradient(folder: Path, tokens: Tensor) -> None:
    grads = []
    for is_on in (False, True):
        made = with_lora(AutoModelForCausalLM.from_pretrained(folder))
        if is_on:
            made.enable_input_require_grads()
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made.train()
        made(input_ids=tokens[:2], labels=tokens[:2], use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in made.named_parameters() if p.requires_grad})
    assert all(torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())


@pytest.mark.parametrize("kind", ["lora", "floats"])
def test_a_resumed_run_equals_a_straight_one(
    folder: Path, tokens: Tensor, tmp_path: Path, kind: str
) -> None:
    results = []
    for name in ("straight", "stopped"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if kind == "lora":
            model = with_lora(model)
        else:
            make_tunable(model, ("scales", "norms"))
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        args = arguments(tmp_path / name, **saving)
        trainer = Trainer(model, args, train_dataset=Sequences(tokens))
        if name == "stopped":
            checkpoint = str(tmp_path / "straight" / "checkpoint-3")
            trainer.train(resume_from_checkpoint=checkpoint)
        else:
            trainer.train()
        results.append(trained(model))
    assert results[0] and all(torch.equal(t, results[1][n]) for n, t in results[0].items())


def test_healing_brings_scales_and_norms_closer_to_the_dense_model(
    dense: Any, model: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    unseen = text_tokens(6, 48, seed=9)
    before, plan = kl(dense, model, unseen), model.hf_quantizer.quantization_config.plan
    codes = {n: m.codes.clone() for n, m in compressed_linears(model).items()}
    names = make_tunable(model, ("scales", "norms"))
    assert any(n.endswith("scales") for n in names) and any("norm" in n for n in names)
    args = arguments(tmp_path / "run", max_steps=40, learning_rate=1e-3)
    trainer = DistillationTrainer(model, args, train_dataset=Sequences(tokens), teacher=dense)
    trainer.train()
    settle(model)
    model.save_pretrained(tmp_path / "healed")
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert kl(dense, healed, unseen) < 0.85 * before
    assert healed.hf_quantizer.quantization_config.plan.levels == plan.levels
    for name, layer in compressed_linears(healed).items():
        assert torch.equal(layer.codes, codes[name])
        assert layer.scales.dtype == torch.float16


def test_targets_from_disk_train_as_the_teacher_itself(
    dense: Any, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    targets = Targets(precompute_targets(dense, tokens, tmp_path / "targets", top_k=32))
    results = []
    for options in ({"train_dataset": targets}, {"train_dataset": Sequences(tokens)}):
        made = with_lora(AutoModelForCausalLM.from_pretrained(folder))
        teacher = {} if options["train_dataset"] is targets else {"teacher": dense, "top_k": 32}
        args = arguments(tmp_path / "run", max_steps=3)
        DistillationTrainer(made, args, **options, **teacher).train()
        results.append(trained(made))
    assert all(torch.allclose(t, results[1][n], atol=1e-5) for n, t in results[0].items())


def test_gradient_accumulation_is_a_larger_batch(
    dense: Any, folder: Path, tokens: Tensor, tmp_path: Path
) -> None:
    results = []
    for batch, steps in ((4, 1), (2, 2)):
        made = with_lora(AutoModelForCausalLM.from_pretrained(folder))
        args = arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        DistillationTrainer(
            made, args, train_dataset=Sequences(tokens), teacher=dense, task_weight=0.5
        ).train()
        results.append(trained(made))
    assert all(torch.allclose(t, results[1][n], atol=1e-6) for n, t in results[0].items())


def test_evaluation_reports_the_divergence(
    dense: Any, model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    args = arguments(tmp_path, prediction_loss_only=True)
    trainer = DistillationTrainer(
        with_lora(model), args, eval_dataset=Sequences(tokens[:8]), teacher=dense, top_k=256
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(kl(dense, model, tokens[:8]), rel=0.1)


def test_factors_of_low_rank_terms_are_trained(dense: Any, tokens: Tensor) -> None:
    model = copy.deepcopy(dense)
    level = "rtn:bits=3,group_size=32 + lowrank:rank=2,metric=plain"
    units = find_units(model)
    plan = Plan({u.name: level for u in units}, shapes={u.name: u.shape for u in units})
    compress_model(model, plan, tokens)
    attach(model, plan)
    names = make_tunable(model, ["factors"])
    assert len(names) == 2 * len(units) and all(n.endswith(("A_1", "B_1")) for n in names)
    model(input_ids=tokens[:1], labels=tokens[:1]).loss.backward()
    assert all(model.get_parameter(n).grad.any() for n in names)
    settle(model)
    assert all(model.get_parameter(n).dtype == torch.float16 for n in names)


def test_settling_an_untrained_model_changes_nothing(model: Any) -> None:
    before = {n: t.clone() for n, t in model.state_dict().items()}
    make_tunable(model, ("scales", "norms", "biases"))
    settle(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())


def test_bad_requests_say_what_to_change(
    dense: Any, model: Any, tokens: Tensor, tiny_model: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="cannot train 'scale'.*did you mean 'scales'"):
        make_tunable(model, ["scale"])
    with pytest.raises(ValueError, match=r"no factors to train; its levels are rtn:bits=3"):
        make_tunable(model, ["factors"])
    model.requires_grad_(False)
    data = Sequences(tokens)
    with pytest.raises(ValueError, match="no trainable parameters: add an adapter"):
        DistillationTrainer(model, arguments(tmp_path), train_dataset=data, teacher=dense)
    made = with_lora(model)
    with pytest.raises(ValueError, match="vocabulary of 300, the model of 256"):
        other = tiny_model(vocab_size=300)
        DistillationTrainer(made, arguments(tmp_path), train_dataset=data, teacher=other)
    with pytest.raises(ValueError, match="needs a teacher"):
        DistillationTrainer(made, arguments(tmp_path), train_dataset=data).train()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("distils", [False, True])
def test_trl_trains_compressed_models(
    dense: Any, model: Any, byte_tokenizer: Any, tmp_path: Path, distils: bool
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class DistillationSFTTrainer(Distillation, SFTTrainer):
        pass

    data = Dataset.from_list([{"text": f"the old fox sees the {w}."} for w in ("sky", "sea") * 8])
    settings = arguments(tmp_path).to_dict()
    kept = ("max_steps", "learning_rate", "report_to", "save_strategy", "use_cpu", "disable_tqdm")
    args = SFTConfig(
        str(tmp_path),
        **{k: settings[k] for k in kept},
        logging_steps=1,
        per_device_train_batch_size=4,
        max_length=32,
        bf16=False,
        gradient_checkpointing=False,
    )
    byte_tokenizer = copy.deepcopy(byte_tokenizer)
    byte_tokenizer.pad_token = byte_tokenizer.eos_token
    kind: Any = DistillationSFTTrainer if distils else SFTTrainer
    options = {"teacher": dense} if distils else {}
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = kind(
        model,
        args,
        train_dataset=data,
        processing_class=byte_tokenizer,
        peft_config=config,
        **options,
    )
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]


def test_the_best_checkpoint_is_loaded_without_a_word_of_unexpected_keys(
    folder: Path, tokens: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    make_tunable(model, ("scales", "norms"))
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(tmp_path, max_steps=4, load_best_model_at_end=True, **saving)
    data = Sequences(tokens[:16])
    Trainer(model, args, train_dataset=data, eval_dataset=data).train()
    Trainer(model, args, train_dataset=data, eval_dataset=data).train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if "unexpected" in r.getMessage().lower()]
    assert {p.name for p in tmp_path.iterdir()} >= {"checkpoint-2", "checkpoint-4"}


def test_a_checkpoint_of_dropped_blocks_has_no_unexpected_keys(
    dense: Any, tokens: Tensor, write_model: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    model = copy.deepcopy(dense)
    units = [u.name for u in find_units(model) if "layers.1.mlp" not in u.name]
    plan = Plan({**dict.fromkeys(units, LEVEL), "model.layers.1.mlp": "drop"})
    compress_model(model, plan, tokens)
    attach(model, plan)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
