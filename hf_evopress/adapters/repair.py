"""Adapt and merge from folder to folder, as the command line runs them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.devices import find_device, on_device
from ..base.memory import within_memory
from ..base.own_code import is_trusted, trusts_code
from ..base.progress import Progress
from ..base.target import whole_folder, writes_out
from ..calibration.data import load_tokens, tokenize_file
from ..calibration.output_moments import BATCH_TOKENS as SENSITIVITY_BATCH
from ..calibration.output_moments import load_moments, output_moments
from ..export.source_files import copy_source_files
from ..models.causal_only import check_causal
from ..models.source import check_context, read_config, window_of
from ..scoring.evaluate import Report, compare_many
from .by_name import dense_name, is_gguf, load, pinned, plan_of, tokenizer_of
from .eora import BATCH_TOKENS, attached, eora
from .folder import CONFIG, WEIGHTS, Adapter, check_target, read_adapter
from .foreign import check_readable
from .lord import from_peft
from .merge import merge_adapter

logger = logging.getLogger(__name__)

_HELD_OUT = 4  # sequences of the data that figures are measured on


@trusts_code
@on_device
@writes_out("model", "data", "dense")
def adapt(
    model: str,
    out: str | Path,
    *,
    data: Sequence[str],
    column: str = "text",
    dense: str | None = None,
    rank: int | None = None,
    size: str | int | None = None,
    error: float | None = None,
    prefix: bool = False,
    dtype: str = "bfloat16",
    n_sequences: int = 64,
    seq_len: int = 1024,
    seed: int = 0,
    sensitivity_tokens: int = 6144,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return `out` with the EoRA adapter of the compressed `model` on the text in `data`.

    model: of ours, or of any quantizer in `foreign`; a folder, a Hub name, or a GGUF file in one.
    dense: the model that it was compressed from, by default the one its plan names. With `size`
    ranks are shared out by what errors cost the model (`sensitivity_tokens`; 0: by their size).
    """
    check_target(out)
    refuse_other_classes(model)
    source = load(model)
    dense = pinned(dense, plan_of(source)) if dense else dense_name(plan_of(source), model)
    check_readable(source)
    base = load(dense)
    check_context(base.config, seq_len, "seq_len")
    words = tokenizer_of(dense if is_gguf(model) else model)  # a GGUF file's is a translation
    cut: dict[str, Any] = {"n_sequences": n_sequences, "seq_len": seq_len, "seed": seed}
    tokens = load_tokens(list(data), words, column=column, **cut)
    request: dict[str, Any] = {"rank": rank, "size": size, "error": error, "prefix": prefix}
    with tempfile.TemporaryDirectory(prefix="evopress-") as folder:
        moments = None
        if size is not None and sensitivity_tokens:
            some = tokens[: max(1, sensitivity_tokens // seq_len)]
            within_memory(
                "sensitivities",
                lambda batch: output_moments(
                    base, some, folder, seed=seed, batch_tokens=batch, progress=progress
                ),
                find_device(), batch_tokens=SENSITIVITY_BATCH, least=seq_len,
            )  # fmt: skip
            moments = partial(load_moments, folder)
        return within_memory(
            "the adapter",
            lambda batch: eora(
                source, base, tokens, out,
                **request, dtype=dtype, moments=moments, batch_tokens=batch, progress=progress,
            ),
            find_device(), batch_tokens=BATCH_TOKENS, least=seq_len,
            way_out="take shorter sequences (--seq-len), or compute on the CPU (--device cpu)",
        )  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """A merged checkpoint and, where text was given, what was measured on it.

    reports: "without adapter" and "merged", both against the model with its adapter beside it,
    or against the dense model, and then "with adapter" as well.
    """

    folder: Path
    reports: Mapping[str, Report] = field(default_factory=dict)


@trusts_code
@on_device
@writes_out("model", "adapter", "data", "work", "against", "test")
def merge(
    model: str,
    adapter: str,
    out: str | Path,
    *,
    exact: bool = False,
    data: Sequence[str] = (),
    column: str = "text",
    work: str | None = None,
    against: str | None = None,
    test: str | None = None,
    window: int | None = None,
    n_sequences: int = 56,
    seq_len: int = 1024,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Return the checkpoint `out`: `model` with `adapter` in its own packed tensors.

    exact: as a low-rank term of each level, which keeps every bit and adds the adapter's bytes.
    Otherwise the levels are made anew from the sum, at the same bits: text from `data`, or the
    statistics in `work`, calibrate those that need it.
    """
    config = refuse_other_classes(model)
    window = window_of(config, window, default=512)
    factors = read_adapter(local_folder(adapter))
    tokens = held_out = None
    if data:
        check_context(config, seq_len, "seq_len")
        everything = load_tokens(
            list(data),
            tokenizer_of(model),
            n_sequences=n_sequences + _HELD_OUT,
            seq_len=seq_len,
            seed=seed,
            column=column,
        )
        tokens, held_out = everything[:n_sequences], everything[n_sequences:].flatten()
    if test is not None:
        held_out = tokenize_file(test, tokenizer_of(model), column=column)
    before = load(model, dtype="auto")
    if (plan := plan_of(before)) is None:
        raise ValueError(
            f"{model} has no plan, so there are no packed levels to merge into; PEFT's "
            "merge_and_unload() merges into dense layers"
        )
    after = load(model, dtype="auto")
    if exact:
        after = from_peft(after, factors)
    else:
        after = merge_adapter(after, factors, tokens, stats=work, progress=progress)
    reports: Mapping[str, Report] = {}
    if held_out is not None:
        dense = None if against is None else load(pinned(against, plan))
        reports = _measure(before, after, factors, held_out, dense, window, progress)
    save_checkpoint(after, out, model)
    return Merged(Path(out), reports)


def _measure(
    before: Any,
    after: Any,
    adapter: Adapter,
    tokens: Tensor,
    dense: Any,
    window: int,
    progress: Progress | None,
) -> dict[str, Report]:
    scaled = {n: (A, adapter.scaling.get(n, 1.0) * B) for n, (A, B) in adapter.factors.items()}

    def beside(ids: Tensor) -> Tensor:
        with attached(before, scaled):
            return before(input_ids=ids.to(before.device), use_cache=False).logits

    models: dict[str, Any] = {"without adapter": before, "merged": after}
    if dense is not None:
        models["with adapter"] = beside
    window = min(window, len(tokens))
    return compare_many(
        models, beside if dense is None else dense, tokens, window=window, progress=progress
    )


# -- what the three share --------------------------------------------------------------------


def refuse_other_classes(name: str) -> Any:
    """Return the config of a model that continues text, None of a GGUF file; ValueError names
    the class of another, before any weights are read."""
    if is_gguf(name):
        return None
    config = read_config(name)
    check_causal(config, name, "adapters and training are for")
    return config


def local_folder(name: str) -> Path:
    """Return the folder of an adapter, downloaded if `name` is a Hub repository."""
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))


def save_checkpoint(model: Any, out: str | Path, source: str) -> Path:
    """Return `out` with the model, its plan and the tokenizer of `source`, whole or not at all."""
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer_of(source).save_pretrained(folder)
        if is_trusted():
            copy_source_files(source, folder, with_code=True)
        model.hf_quantizer.quantization_config.plan.save(folder)
    return Path(out)


def perplexity_of(model: Any, tokens: Tensor, window: int) -> float:
    """Return the perplexity of `model` on tokens (n,), in windows of `window` tokens."""
    return compare_many({"model": model}, None, tokens, window=window)["model"].perplexity
