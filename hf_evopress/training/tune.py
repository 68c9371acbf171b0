"""Train a compressed model on a text: an adapter over it, or its own scales and norms.

With a teacher the loss is the divergence from the dense model (healing), without one the text's
own (fine-tuning). Trainer does the work; checkpoints go to OUT.work, and the same call goes on
from the last one. Floats that a teacher trains are measured on text they did not see, as they are
stored, and kept only if they are closer to it; the checkpoint takes the bytes it took before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..adapters.by_name import is_gguf, load, plan_of, tokenizer_of
from ..adapters.folder import activate, check_target, load_adapter
from ..adapters.kappa import FILE as KAPPA
from ..adapters.kappa import kappa_targets
from ..adapters.peft_layers import takes_adapter
from ..adapters.repair import (
    local_folder,
    perplexity_of,
    refuse_other_classes,
    save_checkpoint,
)
from ..base.devices import find_device, on_device
from ..base.fingerprint import claim
from ..base.memory import within_memory
from ..base.own_code import trusts_code
from ..base.plugins import did_you_mean
from ..base.progress import Progress
from ..base.target import whole_folder, work_beside, writes_out
from ..calibration.data import tokenize_file
from ..models.source import check_context, read_config, window_of
from ..models.units import linear_layers
from ..plans.level import Level
from ..refine.distillation import Targets, divergence
from .arguments import training_arguments
from .checkpoints import train
from .datasets import datasets_of
from .pv_tuning import PVTuning, check_codes, check_judged
from .settings import ADAPTERS, CODES, Tuning, share_of
from .trainer import DistillationTrainer
from .tunable import check_trainable, make_tunable, rates, settle

logger = logging.getLogger(__name__)

Measures = dict[str, Callable[[Any], float]]

_HELDOUT = "held-out text"

_TEXT = ("teacher", "sequences", "heldout", "written", "seq_len", "seed", "column")


@dataclass(frozen=True)
class Tuned:
    """The adapter or checkpoint that was written, the loss of each step, and what it changed.

    perplexity, of each test, and kl, from the teacher on held-out text, are before and after.
    is_kept: not, where floats trained by a teacher were not closer to it and stayed as they were.
    """

    folder: Path
    losses: tuple[float, ...]
    n_trained: int
    perplexity: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    kl: tuple[float, float] | None = None
    is_kept: bool = True


@trusts_code
@on_device
@writes_out("model", "data", "tests", "targets")
def tune(
    model: str,
    out: str | Path,
    settings: Tuning,
    *,
    data: Sequence[str],
    tests: Mapping[str, str] | None = None,
    window: int | None = None,
    targets: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Return what training `model` on the text in `data` gave, written to `out`.

    tests: name -> text file; perplexities before and after are measured on them. targets: where
    the teacher's predictions are kept, by default with the checkpoints; runs on the same text can
    share them.
    """
    if not settings.kinds:
        check_target(out)
    if not is_gguf(model):
        config = refuse_other_classes(model)
        if CODES in (settings.kinds or ()):
            check_codes(_levels(config))
            check_judged(_levels(config), settings.teacher)
        check_context(config, settings.seq_len, "seq_len")
        window = window_of(config, window, default=512)
    work = work_beside(out)
    made_from = {"model": model, "data": list(data), **vars(settings)}
    if settings.kinds:
        made_from["rates"] = "by size"  # the optimiser's state differs from that of one for all
    claim(work, {k: v for k, v in made_from.items() if k != "steps"}, what="a training run")
    # a missing text is an error now, not after the teacher's pass
    texts = {name: tokenize_file(path, tokenizer_of(model)) for name, path in (tests or {}).items()}
    text = {key: getattr(settings, key) for key in _TEXT}
    dataset, heldout = datasets_of(model, data, Path(targets or work), **text, progress=progress)
    return trained(
        model, out, settings, dataset, heldout, work=work, texts=texts, window=window or 512
    )


def trained(
    model: str,
    out: str | Path,
    settings: Tuning,
    dataset: Any,
    heldout: Targets | None,
    *,
    work: Path,
    texts: Mapping[str, Tensor] | None = None,
    window: int = 512,
) -> Tuned:
    """Return what training `model` on `dataset` gave, written to `out`; checkpoints go to `work`.

    heldout: what a teacher says of text that is not in the dataset. texts: name -> tokens (n,),
    to measure perplexities on in windows of `window`.
    """
    stored = read_config(model).dtype
    measures: Measures = {
        name: partial(perplexity_of, tokens=tokens, window=window)
        for name, tokens in (texts or {}).items()
    }
    if heldout is not None:
        measures[_HELDOUT] = partial(divergence, targets=heldout)
    made, trainer, before = _run(model, settings, dataset, measures, work)
    n_trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    if settings.kinds:
        settle(made)
        own = made.dtype
        made.to(stored or own).to(own)  # norms and biases too are measured as they are stored
    after = {name: (before[name], measure(made)) for name, measure in measures.items()}
    kl = after.pop(_HELDOUT, None)
    is_kept = not settings.kinds or kl is None or kl[1] < kl[0]
    if not is_kept:
        logger.warning(
            "training did not bring the model closer to its teacher on held-out text "
            "(KL %.4g before, %.4g after) and is not kept; more sequences or a lower learning rate "
            "may help",
            *(kl or ()),
        )
        made, after = load(model), {name: (before[name], before[name]) for name in after}
    if settings.kinds:
        save_checkpoint(made.to(stored or made.dtype), out, model)
    else:
        with whole_folder(out) as folder:
            made.save_pretrained(str(folder), selected_adapters=["default"])
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, which nobody filled in
    losses = tuple(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return Tuned(Path(out), losses, n_trained, after, kl, is_kept)


def _run(
    model: str, settings: Tuning, dataset: Any, measures: Measures, work: Path
) -> tuple[Any, Trainer, dict[str, float]]:
    """Return the trained model, its trainer, and what was measured before; smaller batches where
    memory runs out."""

    def run(batch_tokens: int) -> tuple[Any, Trainer, dict[str, float]]:
        made = prepared(load(model), settings, kappa_file=_kappa_file(model, work))
        before = {name: measure(made) for name, measure in measures.items()}
        trainer = _trainer(made, _in_batches(settings, batch_tokens), dataset, work)
        train(trainer, work)
        return made, trainer, before

    length = settings.seq_len
    return within_memory(
        "training",
        run,
        find_device(),
        batch_tokens=settings.batch * length,
        least=length,
        way_out="take shorter sequences (--seq-len), or keep fewer activations "
        "(--gradient-checkpointing); the same command goes on from the last checkpoint",
    )


def _levels(config: Any) -> list[Level]:
    """Return the levels of a checkpoint of this package, none for any other model."""
    plan = plan_of(config)
    return list(plan.levels.values()) if plan else []


def _in_batches(settings: Tuning, batch_tokens: int) -> Tuning:
    """Return the settings with at most so many tokens at once, and as many per step as before."""
    batch = max(1, min(settings.batch, batch_tokens // settings.seq_len))
    rounds = -(-settings.batch * settings.accumulate // batch)
    return replace(settings, batch=batch, accumulate=rounds)


def prepared(model: Any, settings: Tuning, *, kappa_file: Path | None = None) -> Any:
    """Return `model`, or a PeftModel around it, with what `settings` trains made trainable.

    kappa_file: where condition numbers are kept, for a target of kappa:SHARE.
    """
    if settings.kinds:
        make_tunable(model, settings.floats)
        return model
    from peft import LoraConfig, get_peft_model

    _unpack(model)
    torch.manual_seed(settings.seed)
    if settings.start:
        made = load_adapter(model, local_folder(settings.start), is_trainable=True)
    else:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha or 2 * settings.rank,
            target_modules=_targets(model, settings.target, kappa_file),
            **ADAPTERS[settings.train],
        )
        made = get_peft_model(model, config)
    if settings.beside:
        made = load_adapter(made, local_folder(settings.beside), name="beside")
        activate(made, ["default", "beside"], train=["default"])
    check_trainable(made)
    return made


@torch.no_grad()
def _unpack(model: Any) -> None:
    """Give layers that unpack at their first call, those of compressed-tensors, their weight.

    PEFT wraps no layer without one.
    """
    if any(type(m) is nn.Linear and not hasattr(m, "weight") for m in model.modules()):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)


def _kappa_file(model: str, work: Path) -> Path:
    """Return a file beside the plan, or in the work folder if the model's is not to be written."""
    folder = Path(model)
    return (folder if folder.is_dir() and os.access(folder, os.W_OK) else work) / KAPPA


def _targets(model: Any, target: str, kappa_file: Path | None) -> list[str]:
    """Return the full names of the layers that `target` describes."""
    if target.startswith("kappa:"):
        return kappa_targets(model, share_of(target), cache=kappa_file)
    names = [name for name in linear_layers(model) if takes_adapter(model, name)]
    if target == "all-linear":
        return names
    parts = {name.rpartition(".")[2] for name in names}
    wanted = [word.strip() for word in target.split(",")]
    for word in wanted:
        if word not in parts:
            raise ValueError(
                f"no linear layer is called {word!r}{did_you_mean(word, sorted(parts))}; "
                f"target is all-linear, kappa:0.2, or some of {', '.join(sorted(parts))}"
            )
    return [name for name in names if name.rpartition(".")[2] in wanted]


def _trainer(model: Any, settings: Tuning, dataset: Any, work: Path) -> Trainer:
    checkpointing = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    args = training_arguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate or (1e-4 if settings.kinds else 2e-4),
        warmup_steps=max(1, settings.steps // 20),
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=1,
        seed=settings.seed,
        bf16=settings.bf16,
        activation_checkpointing=settings.gradient_checkpointing,
        **(checkpointing if settings.gradient_checkpointing else {}),
        report_to="none",
        disable_tqdm=True,
    )
    if settings.gradient_checkpointing and not settings.kinds:
        model.enable_input_require_grads()
    words: dict[str, Any] = {"train_dataset": dataset}
    if settings.kinds:
        words["optimizers"] = (_optimizer(model, settings, args.learning_rate), None)
    if settings.teacher is not None:
        return DistillationTrainer(model, args, task_weight=settings.task_weight, **words)
    return Trainer(model, args, **words)


def _optimizer(model: Any, settings: Tuning, lr: float) -> torch.optim.AdamW:
    """Return what moves the floats of a packed model, and its codes where they are trained."""
    if CODES not in (settings.kinds or ()):
        return torch.optim.AdamW(rates(model, lr), weight_decay=0.0)
    return PVTuning(
        model,
        lr=lr,
        kinds=settings.floats,
        max_change=settings.max_change,
        trust=settings.trust,
        every=settings.every,
    )
