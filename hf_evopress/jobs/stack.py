"""One checkpoint of many sizes: stacks of blocks on all layers, in the order of what each is worth.

Levels with 1, 2, ... blocks are prefixes of one stack, so the store of all of them is no larger
than the longest, and its predicted losses say what every block gains.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..base.devices import using
from ..base.own_code import trusting
from ..base.reading import reading
from ..base.resources import atomic_write, format_size, parse_size
from ..base.target import FILES, claimed, whole_folder, work_beside, writes_out
from ..calibration.text import file_of
from ..loading.blocks import block_bytes, n_fitting
from ..loading.config import EvoPressConfig
from ..loading.file_names import names_of
from ..methods.bitstack import MOST_BLOCKS
from ..models.classes import find_class
from ..models.plain import match_plan
from ..models.source import read_config
from ..plans.block_order import order_of, prefix, with_order
from ..plans.level import Level
from ..plans.plan import Plan
from ..plans.repo import FILE_NAME
from ..recipes.recipe import Recipe
from ..search.block_order import order_blocks
from ..sharing.cards import write_card
from ..sharing.checkpoint_source import LocalSource, open_source
from ..store.block_layout import NAME, arrange, arranged, file_bytes, owners
from ..store.checksums import verify_tensors
from ..store.header import Entry, entries, entries_of
from ..store.level_store import LevelStore
from ..store.tensor_bytes import write_tensors
from .job import Job
from .levels import build_levels
from .measure import verify
from .pipeline import export


def menu(blocks: int, rank: int) -> list[str]:
    """Return the levels of 1 to `blocks` blocks; ValueError where they are too few or too many."""
    if not 1 <= blocks <= MOST_BLOCKS:
        raise ValueError(f"a stack has 1 to {MOST_BLOCKS} blocks, got {blocks}")
    return [f"bitstack:blocks={n},rank={rank}" for n in range(1, blocks + 1)]


def stack(recipe: Recipe, *, overwrite: bool = False, progress: Any = None) -> tuple[Path, Plan]:
    """Return the folder of a model of many sizes and its plan; the recipe's levels are its menu.

    Can be stopped and goes on where it was. Reloaded, it gives what its levels were scored by.
    """
    if recipe.out is None:
        raise ValueError("say where to write the model: --out FOLDER")
    reads = [
        recipe.model,
        recipe.work or work_beside(recipe.out),
        *map(file_of, recipe.data.sources),
    ]
    with claimed(recipe.out, reads=reads, overwrite=overwrite):
        job = Job(recipe, progress=progress)
        with using(job.device, offload=recipe.offload), trusting(recipe.trust_remote_code):
            store = build_levels(job)
            plan = stacked_plan(job, store)
            folder = export(job, store, plan)
            tensors = [e for file in folder.glob("*.safetensors") for e in entries_of(file)]
            arrange(folder, plan, units_in_files(folder / "config.json", plan, tensors))
            verify(job, store, plan, folder)
    recipe = replace(recipe, revision=plan.revision)  # the commit, where a branch was said
    recipe.save(folder / "evopress_recipe.yaml")
    write_card(folder, plan, recipe)
    return folder, plan


def stacked_plan(job: Job, store: LevelStore) -> Plan:
    """Return the plan of all blocks, with their order by predicted loss per byte."""
    largest: dict[str, Level] = {unit.name: job.menus[unit.name][-1] for unit in job.units}
    plan, losses = job.plan(largest), {}
    stacked = [unit.name for unit in job.units if not unit.is_end]
    for unit in stacked:
        scores = [store.scores(unit, level) for level in job.menus[unit]]
        if "sensitivity_nats" not in scores[0]:
            raise ValueError(
                "blocks are put in order by predicted losses, which take gradients: leave "
                "search.sensitivity_tokens above 0"
            )
        losses[unit] = [score["sensitivity_nats"] for score in scores]
    order = order_blocks(losses, {unit: block_bytes(plan, unit) for unit in stacked})
    return with_order(plan, order)


@writes_out("source")
def resize_checkpoint(
    source: str,
    out: str | Path,
    *,
    size: str | int,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Return `out` with the blocks of a model of many sizes that fit into `size` bytes.

    source: a folder or a Hub name, of which the bytes that this takes are read, no more. The file
    of weights is at most `size` long. It is a model of many sizes too, up to its own.
    """
    checkpoint = open_source(source, revision=revision)
    path = checkpoint.file("config.json")
    config, plan = _config_of(path, source)
    weights = sorted(name for name in checkpoint.sizes if name.endswith(".safetensors"))
    tensors = [
        e for name in weights for e in entries(name, checkpoint.sizes[name], checkpoint.read)
    ]
    units = units_in_files(path, plan, tensors)
    order, budget = order_of(plan), parse_size(size)
    others = sum(e.n_bytes for e in tensors) - sum(block_bytes(plan, unit) for unit in order)
    n = n_fitting(plan, others, budget)
    wanted, least = arranged(tensors, plan, n, units), len(set(order))
    while file_bytes(wanted) > budget:
        if n <= least:
            raise ValueError(
                f"the file's header leaves no room: it has no size below "
                f"{format_size(file_bytes(wanted))}"
            )
        n -= 1
        wanted = arranged(tensors, plan, n, units)
    plan = prefix(plan, n)
    with whole_folder(out) as folder:
        write_tensors(folder / NAME, wanted, checkpoint.read)
        _write_config(folder / "config.json", config, plan, {e.name for e in wanted})
        plan.save(folder)
        for name in _others(checkpoint.sizes):
            shutil.copyfile(checkpoint.file(name), folder / name)
    return Path(out)


def download(repo_id: str, *, size: str | int, revision: str | None = None) -> Path:
    """Return a folder with the blocks of a model of many sizes on the Hub that fit into `size`.

    Only their bytes are downloaded, once: the folder stays in the assets of Hugging Face's cache,
    until the Hub, which is asked at each call, has another commit. So does
    `AutoModel*.from_pretrained(name, size=...)`.

    >>> folder = hf_evopress.download("me/stack", size="80MB")          # doctest: +SKIP
    >>> model = AutoModelForCausalLM.from_pretrained(folder)            # doctest: +SKIP
    """
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock

    n_bytes = parse_size(size)
    source = open_source(repo_id, revision=revision)
    if isinstance(source, LocalSource):
        raise ValueError(
            f"{repo_id} is a folder of this machine: from_pretrained reads no more of it than "
            "EvoPressConfig(size=...) says"
        )
    name = f"{source.commit}-{n_bytes}"
    folder = cached_assets_path("hf_evopress", repo_id, name)
    with WeakFileLock(folder.with_name(f"{name}.lock")):  # other processes wait
        if not (folder / FILES).is_file():
            resize_checkpoint(repo_id, folder, size=size, revision=source.commit)
    return folder


def sizes_of(folder: Path) -> tuple[int, int]:
    """Return the bytes of the smallest and of the largest file that a model of many sizes gives."""
    path = folder / "config.json"
    _, plan = _config_of(path, str(folder))
    file, order = folder / NAME, order_of(plan)
    tensors = entries_of(file)
    units = units_in_files(path, plan, tensors)
    return file_bytes(arranged(tensors, plan, len(set(order)), units)), file.stat().st_size


def units_in_files(config: Path, plan: Plan, tensors: Sequence[Entry]) -> dict[str, str]:
    """Return the name of a layer in the files -> the unit that it is, where they differ.

    config: the config.json of a model, of which a skeleton is made only if there is need to: most
    vision-language models are written by other names than their modules have.
    """
    if not (layers := owners(tensors) - set(plan)):
        return {}
    settings = read_config(config.parent)
    kind = find_class((getattr(settings, "architectures", None) or [""])[0])
    if kind is None:
        return {}
    with torch.device("meta"):
        skeleton = kind.loader.from_config(settings)
    match_plan(skeleton, plan)  # its experts one by one, as they are written
    names = names_of(skeleton, [f"{layer}.weight" for layer in layers], are_packed=True)
    return {layer: names.of_model(f"{layer}.weight").removesuffix(".weight") for layer in layers}


def _config_of(path: Path, source: str) -> tuple[dict[str, Any], Plan]:
    """Return what config.json says, and the plan in it."""
    with reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        quantized = config.get("quantization_config") or {}
    if quantized.get("quant_method") != "evopress":
        raise ValueError(f"{source} is not a compressed model of hf_evopress")
    plan = EvoPressConfig.from_dict(quantized).plan
    if plan is None:
        raise ValueError(f"{source} has no plan in its config.json")
    return config, plan


def _write_config(path: Path, config: dict[str, Any], plan: Plan, names: set[str]) -> None:
    """Write config.json for the tensors of `names`, after comparing them with their checksums."""
    quantized = dict(config["quantization_config"])
    checksums = {k: v for k, v in quantized.get("checksums", {}).items() if k in names}
    verify_tensors(entries_of(path.with_name(NAME)), checksums)
    quantized |= {"plan": json.loads(plan.to_json()), "checksums": checksums}
    text = json.dumps({**config, "quantization_config": quantized}, indent=2) + "\n"
    atomic_write(path, text)


def _others(names: Any) -> list[str]:
    """Return the files that come along as they are."""
    ours = {"config.json", FILE_NAME, f"{NAME}.index.json", "README.md", ".gitattributes"}
    return sorted(
        name
        for name in names
        if name not in ours and not name.endswith(".safetensors") and not name.startswith(".")
    )
