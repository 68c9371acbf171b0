"""Find and read plans: in a file, a folder, or a Hub repository of one plan or several.

    evopress_plan.json     the plan of a repository
    evopress_plans.json    the index, where there are several: name, bits and loss of each

Names of plans are plain file names and are looked up, never joined to paths unchecked; sizes
are asked for before anything is downloaded. Needs no torch, and huggingface_hub only when used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.plugins import did_you_mean
from ..base.reading import reading
from .hub_errors import clear_errors, patiently

FILE_NAME = "evopress_plan.json"
INDEX_NAME = "evopress_plans.json"
TAG = "evopress-plan"
QUANT_METHOD = "evopress"
MAX_BYTES = 64 * 2**20  # a plan of 100 000 units is 15 MB; anything larger is not a plan
MAX_PLANS = 1000
INDEX_VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.json")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Entry:
    """One line of an index: a plan file and what its plan says of itself."""

    file: str
    base_model: str | None = None
    bits_per_weight: float | None = None
    kl_nats: float | None = None
    asked: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values that are known."""
        return {key: value for key, value in vars(self).items() if value is not None}


def check_name(name: str) -> str:
    """Return `name` if it is a plain file name such as plan-3.3bit.json, or raise ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            f"a plan's name is a plain file name such as plan-3.3bit.json, got {name!r}"
        )
    return name


def is_repo_id(text: object) -> bool:
    """Return whether `text` could be a repository on the Hub: `name` or `owner/name`."""
    return isinstance(text, str) and bool(_REPO.fullmatch(text)) and ".." not in text


def read_plan(
    source: str | Path,
    *,
    revision: str | None = None,
    filename: str | None = None,
    token: str | None = None,
) -> tuple[str, str]:
    """Return the text of a plan and where it was found.

    source: a file, a folder, a Hub repository, or repository@revision. filename: which plan,
    where there are several. A folder or repository without a plan file may hold the plan in its
    config.json.
    """
    if filename is not None:
        check_name(filename)
    path = Path(source)
    if path.is_file():
        return read_text(path), str(path)
    if path.is_dir():
        return _from_folder(path, str(path), filename)
    repo_id, at, tail = str(source).partition("@")
    if not is_repo_id(repo_id) or repo_id.endswith(".json") or (at and not tail):
        raise FileNotFoundError(
            f"no plan at {source}; a plan is a file like {FILE_NAME}, a folder that holds one, "
            "or a repository on the Hub"
        )
    if tail and revision not in (None, tail):
        raise ValueError(f"{source} names revision {tail!r}, but revision={revision!r}")
    return _from_hub(repo_id, tail or revision, filename, token)


def read_index(text: str, where: str = INDEX_NAME) -> dict[str, Entry]:
    """Return the entries of an index by file name; ValueError says what is wrong with it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    plans = data.get("plans") if isinstance(data, dict) else None
    if not isinstance(plans, list):
        raise ValueError(f"{where} has no list 'plans'")
    if data.get("format_version") != INDEX_VERSION:
        raise ValueError(
            f"{where} has format_version {data.get('format_version')!r}, this hf-evopress reads "
            f"{INDEX_VERSION}: pip install --upgrade hf-evopress"
        )
    if len(plans) > MAX_PLANS:
        raise ValueError(f"{where} lists {len(plans)} plans; at most {MAX_PLANS} are read")
    try:
        entries = [_entry(item) for item in plans]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
    found = {entry.file: entry for entry in entries}
    if len(found) < len(entries):
        raise ValueError(f"{where} names a plan twice")
    return found


def index_text(entries: Sequence[Entry]) -> str:
    """Return the index of `entries`, smallest first."""
    ordered = sorted(entries, key=lambda e: (e.bits_per_weight or math.inf, e.file))
    plans = [entry.to_dict() for entry in ordered]
    return json.dumps({"format_version": INDEX_VERSION, "plans": plans}, indent=2) + "\n"


def entry_of(file: str, plan: Mapping[str, Any]) -> Entry:
    """Return the index line of a plan, given as `Plan.to_dict()`: only what it says itself."""
    budget, evaluation = plan.get("budget") or {}, plan_rows(plan)
    searched = evaluation.get("searched", {})
    bits = searched.get("bits_per_weight", budget.get("bits_per_weight"))
    asked = budget.get("asked")
    return Entry(
        check_name(file),
        base_model=plan.get("base_model"),
        bits_per_weight=_number(bits),
        kl_nats=_number(searched.get("kl_nats", (plan.get("results") or {}).get("kl_nats"))),
        asked=asked if isinstance(asked, str) else None,
    )


def plan_rows(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measured rows of a plan (`Plan.to_dict()`) by name; none where not measured."""
    rows = (plan.get("results") or {}).get("evaluation")
    if not isinstance(rows, Mapping):
        return {}
    return {str(name): dict(row) for name, row in rows.items() if isinstance(row, Mapping)}


def list_plans(
    source: str, *, revision: str | None = None, token: str | None = None
) -> dict[str, Entry]:
    """Return the index of a folder or repository; empty where it has none."""
    path = Path(source)
    if path.is_dir():
        index = path / INDEX_NAME
        return read_index(read_text(index), str(index)) if index.is_file() else {}
    file = _download(source, [INDEX_NAME], revision, token).get(INDEX_NAME)
    return read_index(read_text(file), f"{source}/{INDEX_NAME}") if file else {}


def find_repos(base_model: str, *, limit: int = 50, token: str | None = None) -> list[str]:
    """Return the repositories on the Hub with plans for `base_model`, as the Hub orders them."""
    from huggingface_hub import HfApi

    if not is_repo_id(base_model):
        raise ValueError(f"a model on the Hub is named owner/name, got {base_model!r}")
    with clear_errors(base_model):
        found = HfApi(token=token).list_models(
            filter=[TAG, f"base_model:{base_model}"], limit=limit
        )
        return [model.id for model in found if is_repo_id(model.id)]


def _from_folder(folder: Path, where: str, filename: str | None) -> tuple[str, str]:
    there = {
        name: folder / name
        for name in (filename, FILE_NAME, INDEX_NAME, "config.json")
        if name and (folder / name).is_file()
    }
    if filename is None and FILE_NAME not in there and INDEX_NAME in there:
        entries = read_index(read_text(there[INDEX_NAME]), f"{where}/{INDEX_NAME}")
        only = _only(entries, where)
        if (folder / only).is_file():
            there[only] = folder / only
        return _choose(there, where, only)
    return _choose(there, where, filename)


def _from_hub(
    repo_id: str, revision: str | None, filename: str | None, token: str | None
) -> tuple[str, str]:
    where = f"{repo_id}@{revision}" if revision else repo_id
    if filename is not None:
        return _choose(_download(repo_id, [filename], revision, token), where, filename)
    there = _download(repo_id, [FILE_NAME, INDEX_NAME, "config.json"], revision, token)
    if FILE_NAME not in there and INDEX_NAME in there:
        only = _only(read_index(read_text(there[INDEX_NAME]), f"{where}/{INDEX_NAME}"), where)
        return _choose(_download(repo_id, [only], revision, token), where, only)
    return _choose(there, where, None)


def _choose(there: Mapping[str, Path], where: str, filename: str | None) -> tuple[str, str]:
    """Return text and place of the plan among the files that a folder or repository has."""
    name = filename or FILE_NAME
    if name in there:
        return read_text(there[name]), f"{where}/{name}"
    if filename is None and "config.json" in there:
        with reading(f"{where}/config.json"):
            settings = json.loads(read_text(there["config.json"]))
        quantized = settings.get("quantization_config") if isinstance(settings, dict) else None
        if isinstance(quantized, dict) and quantized.get("quant_method") == QUANT_METHOD:
            return json.dumps(quantized.get("plan")), f"{where}/config.json"
    hint = "" if filename else f": neither {FILE_NAME} nor one in config.json"
    raise FileNotFoundError(f"no plan {filename or ''} at {where}{hint}".replace("  ", " "))


def _only(entries: Mapping[str, Entry], where: str) -> str:
    if len(entries) != 1:
        listed = ", ".join(entries) or "none"
        raise ValueError(f"{where} holds {len(entries)} plans; name one with filename: {listed}")
    return next(iter(entries))


def _download(
    repo_id: str, names: Sequence[str], revision: str | None, token: str | None
) -> dict[str, Path]:
    """Return the local paths of those of `names` that the repository has.

    Their sizes are asked for first: a file too large to be a plan is not downloaded. Without a
    connection, what an earlier download left in the cache is used.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    with clear_errors(repo_id, revision):
        try:
            api = HfApi(token=token)
            infos = patiently(lambda: api.get_paths_info(repo_id, list(names), revision=revision))
        except HfHubHTTPError:
            raise
        except (HTTPError, OfflineModeIsEnabled):
            cached = {name: _cached(repo_id, name, revision) for name in names}
            if not any(cached.values()):
                raise
            return {name: path for name, path in cached.items() if path}
        for info in infos:
            if getattr(info, "size", 0) > MAX_BYTES:
                raise ValueError(
                    f"{repo_id}/{info.path} has {info.size} bytes; at most {MAX_BYTES} are read"
                )
        there = [info.path for info in infos if info.path in names]
        return {
            name: Path(hf_hub_download(repo_id, name, revision=revision, token=token))
            for name in there
        }


def _cached(repo_id: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def read_text(path: Path) -> str:
    """Return the text of a file of at most MAX_BYTES, or raise ValueError."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes; at most {MAX_BYTES} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict):
        raise TypeError(f"an entry is an object, got {type(item).__name__}")
    known = list(Entry.__dataclass_fields__)
    for key in item:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{did_you_mean(str(key), known)}")
    entry = Entry(**{"file": "", **item})
    check_name(entry.file)
    for key in ("base_model", "asked"):
        value = getattr(entry, key)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise TypeError(f"{key} of {entry.file} is text, got {value!r}")
    for key in ("bits_per_weight", "kl_nats"):
        if getattr(entry, key) is not None and _number(getattr(entry, key)) is None:
            raise TypeError(f"{key} of {entry.file} is a number, got {getattr(entry, key)!r}")
    return entry


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 and math.isfinite(value) else None
