"""Generate cards of models and adapters from the plan, the recipe and the files.

`write_card(folder)` writes README.md and the pictures it shows beside the model's files.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.reading import read_object
from ..base.resources import atomic_write
from ..methods import compose
from ..plans.block_order import has_order
from ..plans.card_template import (
    hub_base,
    level_counts,
    measured_on,
    protocol,
    render,
    results_rows,
)
from ..plans.plan import Plan
from ..plans.repo import INDEX_NAME, TAG, plan_rows, read_index
from ..plans.widths import is_narrow
from ..recipes.recipe import REFINE, Recipe
from .report import cache_lines, ends_of, widths_line
from .task_results import model_index, read_results, table_rows

CARD = "README.md"
RECIPE = "evopress_recipe.yaml"
HEAT_MAP = "evopress_plan.png"
CURVE = "evopress_search.png"
FRONT = "evopress_plans.png"
MARK = "<!-- written by hf-evopress"
MAX_HEADER_BYTES = 100 * 2**20  # the limit that safetensors itself sets


def write_card(
    folder: str | Path,
    plan: Plan | None = None,
    recipe: Recipe | None = None,
    *,
    name: str | None = None,
) -> Path:
    """Return the card of a model or adapter folder, written with its pictures.

    plan, recipe: by default those in the folder. name: what from_pretrained is given, a
    repository or by default the folder's name. Each file is written whole or not at all.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    if (folder / "adapter_config.json").is_file():
        return atomic_write(folder / CARD, adapter_card(folder, name))
    if plan is None:
        plan = Plan.from_pretrained(folder)
    if recipe is None and (folder / RECIPE).is_file():
        recipe = Recipe.load(folder / RECIPE)
    return atomic_write(folder / CARD, model_card(folder, plan, recipe, name=name))


def is_ours(card: str | Path) -> bool:
    """Return whether a card may be written anew: it is missing, or still says that we wrote it."""
    path = Path(card)
    return not path.is_file() or MARK in path.read_text(encoding="utf-8", errors="replace")


def exact_bits(plan: Plan) -> dict[str, float] | None:
    """Return the stored bits per weight of each unit, None where the plan lacks shapes."""
    bits = {}
    for unit, level in plan.items():
        if level.is_drop:
            bits[unit] = 0.0
        elif unit in plan.shapes:
            shape = plan.shapes[unit]
            level = compose.normalize(level)
            stored = compose.cost_bits(level, shape) - compose.shared_bits(level, shape) / 2
            bits[unit] = stored / math.prod(shape)
        else:
            return None
    return bits


def model_card(folder: Path, plan: Plan, recipe: Recipe | None, *, name: str) -> str:
    """Return the text of a model's card; draws the pictures that it shows into `folder`."""
    bits, measured = exact_bits(plan), plan_rows(plan.to_dict())
    rows = {"this model" if row == "searched" else row: found for row, found in measured.items()}
    headers, cells = results_rows(rows)
    base, stored, kind = hub_base(plan.base_model), stored_bytes(folder), _class_of(folder)
    tasks = read_results(folder)
    task_headers, task_rows = table_rows(tasks)
    metadata = {
        "library_name": "transformers",
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "pipeline_tag": kind.task,
        "tags": ["evopress", TAG],
        "model-index": model_index(name, kind.task, tasks),
    }
    return render(
        "model.md",
        metadata,
        name=name,
        kind=kind,
        base_model=base,
        revision=plan.revision,
        bits=mean_bits(plan, bits),
        asked=_text(plan.budget.get("asked")),
        is_searched="strategy" in plan.search,
        is_stack=has_order(plan),
        target=_text(plan.search.get("for")),
        headers=headers,
        rows=cells,
        protocol=protocol(rows),
        text=measured_on(plan.to_dict()),
        task_headers=task_headers,
        task_rows=task_rows,
        against=against(plan.search),
        refined=refined(plan.results),
        counts=level_counts({u: str(v) for u, v in plan.items()}, plan.shapes),
        needs_data=any(compose.needs_stats(compose.normalize(v)) for v in plan.values()),
        cache=cache_lines(plan),
        widths=widths_line(plan),
        is_narrow=is_narrow(plan.search),
        parts=_parts(plan),
        checkpoint_bytes=sum(stored.values()) or None,
        kept_bytes=_kept_bytes(plan, stored),
        has_ends=any(not plan[unit].is_dense for unit in ends_of(plan)),
        recipe=portable(recipe),
        versions=_versions(plan.search),
        **_pictures(folder, plan, bits),
    )


def _class_of(folder: Path) -> Any:
    """Return the class of the model in a folder, a causal language model where it does not say."""
    from ..models.classes import CAUSAL, find_class

    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        config = {}
    for name in config.get("architectures") or () if isinstance(config, Mapping) else ():
        if (found := find_class(str(name))) is not None:
            return found
    return CAUSAL


def adapter_card(folder: Path, name: str) -> str:
    """Return the text of a PEFT adapter's card, from its config and its tensors."""
    config = read_object(folder / "adapter_config.json")
    base = hub_base(_text(config.get("base_model_name_or_path")))
    stored = stored_bytes(folder)
    tensors = tensor_shapes(folder)
    ranks = sorted({shape[0] for key, shape in tensors.items() if ".lora_A." in key})
    modules = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}
    metadata = {
        "library_name": "peft",
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "pipeline_tag": "text-generation",
        "tags": ["evopress", "lora"],
    }
    return render(
        "adapter.md",
        metadata,
        name=name,
        subfolder=None,
        base_model=base,
        revision=_text(config.get("revision")),
        kind=str(config.get("peft_type", "LORA")),
        n_modules=len(modules),
        ranks=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else None,
        n_parameters=sum(math.prod(shape) for shape in tensors.values()) or None,
        adapter_bytes=sum(stored.values()) or None,
        about=_about(folder),
        headers=[],
        rows=[],
        protocol=None,
        text=None,
        against=[],
    )


def mean_bits(plan: Plan, bits: Mapping[str, float] | None) -> float | None:
    """Return stored bits per compressed weight of the whole plan, None where unknown."""
    told = plan.budget.get("bits_per_weight")
    if isinstance(told, (int, float)):  # knows the weights inside dropped sub-blocks, too
        return float(told)
    if bits is None or any(level.is_drop for level in plan.values()):
        return None
    weights = {unit: math.prod(shape) for unit, shape in plan.shapes.items()}
    return sum(bits[unit] * n for unit, n in weights.items()) / sum(weights.values())


def against(search: Mapping[str, Any]) -> list[tuple[str, float, float, int]]:
    """Return the paired comparisons of a search: name, mean difference, standard error, n."""
    found = search.get("against")
    if not isinstance(found, Mapping):
        return []
    keys = ("difference", "stderr", "sequences")
    return [
        (str(name), *(row[key] for key in keys))
        for name, row in found.items()
        if isinstance(row, Mapping) and all(isinstance(row.get(k), (int, float)) for k in keys)
    ]


def refined(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return mode, losses before and after, and is_kept of each way a plan was finished."""
    found = (results.get(key) for key in ("refined", "distilled"))
    return [
        notes
        for notes in found
        if isinstance(notes, Mapping)
        and notes.get("mode") in REFINE
        and all(isinstance(notes.get(key), float) for key in ("before", "after"))
    ]


def portable(recipe: Recipe | None) -> str | None:
    """Return a recipe as YAML without what is only true of the machine that ran it."""
    if recipe is None:
        return None
    import yaml

    values = {k: v for k, v in recipe.to_dict().items() if k not in ("out", "work")}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip().replace("```", "")


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the size of each safetensors file of a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a folder's safetensors files, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in stored_bytes(folder):
        for key, entry in _header(folder / name).items():
            if key != "__metadata__":
                shapes[key] = tuple(entry["shape"])
    return shapes


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError(f"{path} is not a safetensors file: its header has {length} bytes")
        try:
            return dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged header: {error}") from error


def _about(folder: Path) -> dict[str, str]:
    """Return what an adapter of this package says of itself in its file's metadata."""
    for name in stored_bytes(folder):
        metadata = _header(folder / name).get("__metadata__")
        said = metadata.get("hf_evopress") if isinstance(metadata, Mapping) else None
        try:
            values = json.loads(said) if isinstance(said, str) else None
        except (ValueError, RecursionError):
            continue  # a note, not a part of the adapter
        if isinstance(values, Mapping):
            plain = {k: v for k, v in values.items() if isinstance(v, (str, int, float))}
            return {
                str(k).replace("_", " "): f"{v:.4g}" if isinstance(v, float) else str(v)
                for k, v in plain.items()
            }
    return {}


def _kept_bytes(plan: Plan, stored: Mapping[str, int]) -> int | None:
    bits = exact_bits(plan)
    if bits is None or not stored:
        return None
    packed = sum(bits[unit] * math.prod(shape) for unit, shape in plan.shapes.items()) / 8
    return max(0, sum(stored.values()) - round(packed))


def _pictures(folder: Path, plan: Plan, bits: Mapping[str, float] | None) -> dict[str, Any]:
    """Draw what there is to draw; return the names of the files by what they show."""
    from .plots import convergence_plot, heat_map_plot, pareto_plot

    drawn: dict[str, Any] = {"heat_map": None, "curve": None, "front": None}
    if all(re.search(r"(?:^|\.)\d+(?:\.|$)", unit) for unit in plan):
        drawn["heat_map"] = heat_map_plot(plan, folder / HEAT_MAP, bits).name
    history = plan.search.get("history")
    if isinstance(history, list) and len(rows := [r for r in history if _has_loss(r)]) > 1:
        drawn["curve"] = convergence_plot(rows, folder / CURVE).name
    index = folder / INDEX_NAME
    entries = read_index(index.read_text(encoding="utf-8")).values() if index.is_file() else ()
    points = [(e.bits_per_weight, e.kl_nats) for e in entries if e.bits_per_weight and e.kl_nats]
    if len(points) > 1:
        drawn["front"] = pareto_plot({"plans": points}, folder / FRONT).name
    return drawn


def _has_loss(row: Any) -> bool:
    return isinstance(row, Mapping) and all(
        isinstance(row.get(key), (int, float)) for key in ("generation", "loss")
    )


def _parts(plan: Plan) -> list[str]:
    """Return what of the plan's tensors the card explains."""
    used = {term.method for level in plan.values() for term in level.terms}
    known = {"codes": {"rtn", "gptq"}, "walks": {"trellis"}, "factors": {"lowrank"}}
    others = used - {"dense", "drop", "zero"}.union(*known.values())
    return [part for part, methods in known.items() if used & methods] + ["others"] * bool(others)


def _versions(search: Mapping[str, Any]) -> str | None:
    found = search.get("versions")
    if not isinstance(found, Mapping):
        return None
    return ", ".join(f"{name} {version}" for name, version in found.items()).replace("<", "")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
