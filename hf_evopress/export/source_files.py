"""Bring along what a model's folder holds besides weights: processors, templates, modules, code.

Tokenizer, config and generation config are written by transformers; all else that the source has
is copied: image processors, feature extractors, chat templates, the modules of
sentence-transformers with their weights, licences, and custom code where it was trusted.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..plans.repo import is_repo_id

logger = logging.getLogger(__name__)

_ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".yaml", ".yml", ".bpe", ".vocab")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_OURS = (
    "config.json",
    "evopress_",
    "model.safetensors.index",
    "pytorch_model.bin.index",
    "adapter_",
)
_MODULES = "modules.json"  # of sentence-transformers


def copy_source_files(
    source: str | Path, target: Path, *, revision: str | None = None, with_code: bool = False
) -> list[str]:
    """Return the files of `source`, a folder or a Hub name, that were copied into `target`.

    What is in `target` already stays as it is. with_code: Python files too.
    """
    folder = _local(source, revision, with_code)
    if folder is None:
        return []
    copied = []
    for name in _names(folder, with_code):
        here = target / name
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, here)
            copied.append(name)
    if copied:
        logger.info("copied from %s: %s", source, ", ".join(copied))
    return copied


def _names(folder: Path, with_code: bool) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith((*_OURS, ".")):
            continue
        is_known = path.suffix.lower() in _ENDINGS or path.name.startswith(_NAMES)
        if is_known or (with_code and path.suffix == ".py"):
            yield path.name
    for module in _modules(folder):
        for path in sorted((folder / module).rglob("*")):
            if path.is_file():
                yield path.relative_to(folder).as_posix()


def _modules(folder: Path) -> list[str]:
    """Return the sub-folders that modules.json names, those that stay inside the folder."""
    path = folder / _MODULES
    if not path.is_file():
        return []
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        named = [str(entry["path"]) for entry in said if entry.get("path")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    root = folder.resolve()
    return [n for n in named if (folder / n).is_dir() and root in (folder / n).resolve().parents]


def _local(source: str | Path, revision: str | None, with_code: bool) -> Path | None:
    """Return the folder of a model's small files, from the Hub or its cache if need be."""
    if Path(source).is_dir():
        return Path(source)
    if not is_repo_id(str(source)):
        return None
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in _ENDINGS] + [f"{name}*" for name in _NAMES]
    patterns += ["[0-9]_*/*"] + ["*.py"] * with_code
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except OSError as error:  # the model itself is there: this must not cost a finished run
        logger.warning("files beside the weights of %s were not copied: %s", source, error)
        return None
