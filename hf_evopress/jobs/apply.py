"""Compress a dense model by an existing plan, without a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..base.devices import on_device
from ..base.own_code import is_trusted, trusts_code
from ..base.target import whole_folder, writes_out
from ..export.source_files import copy_source_files
from ..loading.config import EvoPressConfig
from ..loading.quantizer import register_with_transformers
from ..models.source import kind_of, load_checked, read_config, read_tokenizer


@trusts_code
@on_device
@writes_out("plan", "model", "data")
def apply_plan(
    plan: str,
    out: str | Path,
    *,
    model: str | None = None,
    data: Sequence[str] | None = None,
    column: str = "text",
    n_sequences: int = 56,
    seq_len: int = 1024,
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Return the folder `out` with `model` compressed by `plan`, without a search.

    model: the dense model, by default the plan's own, of the revision that it names. Levels that
    need no data are made while the model loads; others are calibrated on `data`. overwrite:
    replace all that is in `out`, ours or not.
    """
    register_with_transformers()
    config = EvoPressConfig(
        plan,
        data=list(data or ()) or None,
        column=column,
        n_sequences=n_sequences,
        seq_len=seq_len,
        seed=seed,
    )
    source = model or (config.plan.base_model if config.plan else None)
    if source is None:
        raise ValueError(f"the plan {plan} does not name its model; give one with --model")
    if revision is None and config.plan is not None and source == config.plan.base_model:
        revision = config.plan.revision
    kind = kind_of(read_config(source, revision=revision), source)
    tokenizer = read_tokenizer(source, revision=revision)
    compressed = load_checked(source, kind=kind, revision=revision, quantization_config=config)
    with whole_folder(Path(out)) as folder:
        compressed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_source_files(source, folder, revision=revision, with_code=is_trusted())
        compressed.hf_quantizer.quantization_config.plan.save(folder)
    return Path(out)
