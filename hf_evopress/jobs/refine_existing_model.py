"""Refine an existing compressed model end to end: distillation at no extra byte.

Scales, low-rank factors and norms learn from the dense model's predictions while codes stay: the
continuous half ("V step") of PV-Tuning (Malinovskii et al. 2024, arXiv:2405.14852). It takes a
backward pass through the whole model, where `refine` needs one block at a time, and sees what no
block by itself can: which errors the rest of the model makes up for.

Zero points are whole numbers of steps and stay too: moved by one step under codes that do not move,
each of 179 712 groups of SmolLM2-135M at 3.3 bits raised its layer's error. Mode `best` moves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapters.by_name import dense_name, load, pinned, tokenizer_of
from ..base.devices import find_device, on_device
from ..base.own_code import trusts_code
from ..base.progress import Progress
from ..base.target import writes_out
from ..calibration.data import tokenize_file
from ..models.size import model_size, stored_bytes
from ..models.source import check_context, read_config, window_of
from ..plans.plan import Plan
from ..scoring.evaluate import compare_many
from ..sharing.cards import write_card
from ..training.tune import tune
from .measure import UNREFINED, Row, figures, generate
from .pipeline import Result
from .refinement import distilled_notes, end_to_end_settings


@trusts_code
@on_device
@writes_out("model", "data", "dense", "test")
def refine_end_to_end(
    model: str,
    out: str | Path,
    *,
    data: Sequence[str],
    column: str = "text",
    dense: str | None = None,
    steps: int = 200,
    learning_rate: float | None = None,
    codes: bool = False,
    test: str | None = None,
    window: int | None = None,
    max_windows: int | None = 10,
    n_sequences: int = 56,
    written: int = 0,
    seq_len: int = 1024,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Return the compressed `model` after `steps` of distillation, written to `out`, measured.

    dense: the teacher, by default the model that the plan names. data: text to learn from, of
    which four sequences are held out: the model stays as it was unless they say it is closer.
    written: sequences that the dense model writes itself, to learn from as well. codes: they move
    as well (PV-Tuning's P-step), not only what is continuous.
    test: text for the final figures. A stopped run goes on from its last checkpoint, in OUT.work.
    """
    config = _check_compressed(model)
    check_context(config, seq_len, "seq_len")
    window = window_of(config, window)
    plan = Plan.from_pretrained(model)
    dense = pinned(dense, plan) if dense else dense_name(plan, model, option="--model")
    unseen = None if test is None else _unseen(test, model, window)
    settings = end_to_end_settings(
        dense,
        device=find_device(),
        steps=steps,
        learning_rate=learning_rate,
        codes=codes,
        seq_len=seq_len,
        sequences=n_sequences,
        column=column,
        written=written,
        seed=seed,
    )
    done = tune(model, out, settings, data=data, progress=progress)
    notes = distilled_notes(done, steps, written=written)
    after = load(str(out))
    plan = Plan.load(out)
    plan = plan.replace(results={**plan.results, "distilled": notes})
    rows: tuple[Row, ...] = ()
    if test is not None and unseen is not None:
        rows = _rows(load(dense), load(model), after, out, unseen, window, max_windows, progress)
        plan = plan.replace(results={**plan.results, **figures(rows), "text": Path(test).name})
    plan.save(out)
    write_card(out, plan)
    return Result(Path(out), plan, rows, generate(tokenizer_of(str(out)), after))


def _unseen(test: str, model: str, window: int) -> Tensor:
    """Return the tokens of a test text; too short a one raises ValueError before any training."""
    tokens = tokenize_file(test, tokenizer_of(model))
    if len(tokens) < window:
        raise ValueError(f"{test} has {len(tokens)} tokens, one window needs {window}")
    return tokens


def _rows(
    dense: Any,
    before: Any,
    after: Any,
    out: str | Path,
    tokens: Tensor,
    window: int,
    max_windows: int | None,
    progress: Progress | None,
) -> tuple[Row, ...]:
    models = {"dense": dense, "searched": after, UNREFINED: before}
    reports = compare_many(
        models, dense, tokens, window=window, max_windows=max_windows, progress=progress
    )
    shapes = Plan.load(out).shapes
    bits = model_size(after, shapes=shapes).bits_per_weight
    size = stored_bytes(out)
    stored = {"dense": (16.0, sum(2 * p.numel() for p in dense.parameters()))}
    return tuple(Row(name, *stored.get(name, (bits, size)), reports[name]) for name in models)


def _check_compressed(model: str) -> Any:
    """Return the config of a compressed model; ValueError, at once, for a plan or a dense one."""
    way_out = "apply the plan first (hf-evopress apply), or take mode fast or best"
    if Path(model).is_file() or (
        Path(model).is_dir() and not (Path(model) / "config.json").is_file()
    ):
        raise ValueError(f"end-to-end refines a compressed model, and {model} is none: {way_out}")
    config = read_config(model)
    if getattr(config, "quantization_config", None) is None:
        raise ValueError(f"end-to-end refines a compressed model, and {model} is dense: {way_out}")
    return config
