"""Push and pull models and adapters: one commit, data only, whole or not at all.

Pushed and pulled is what a folder of this package holds: safetensors, JSON, text, pictures. A
file of another kind, a pickle above all, is refused by name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.progress import Progress
from ..base.reading import read_object, reading
from ..base.resources import clear_leftovers, sha256
from ..base.target import FILES, claimed, put
from ..plans.hub_errors import clear_errors, patiently
from ..plans.plan import Plan
from ..plans.push import open_repo, push_plans
from ..plans.repo import FILE_NAME, INDEX_NAME, check_name, is_repo_id, read_index, read_text

DATA = (".safetensors", ".json", ".md", ".txt", ".model", ".yaml", ".png", ".svg", ".jinja")
DATA_NAMES = ("LICENSE", "NOTICE", ".gitattributes", ".gitignore")
MAX_FILES = 2000
RUN = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py", ".so", ".joblib", ".npy")

_PART = re.compile(r"[\w+@-][\w.+@ -]*")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|model\.safetensors(\.index\.json)?")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
) -> Any:
    """Return CommitInfo after pushing a model, an adapter or a folder of plans in one commit.

    subfolder: where in the repository, such as "eora" for an adapter in its model's repository.
    Shards of an earlier push that the folder no longer has are deleted in the same commit.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    clear_leftovers(folder)
    options = {"private": private, "revision": revision, "create_pr": create_pr, "token": token}
    if plans := plans_in(folder):
        return push_plans(plans, repo_id, commit_message=commit_message, **options)  # type: ignore[arg-type]
    files = check_folder(folder)
    kind = "adapter" if "adapter_config.json" in files else "model"
    prefix = f"{check_path(subfolder)}/" if subfolder else ""
    if kind == "adapter" and "config.json" in files:
        raise ValueError(
            f"{folder} holds a model and an adapter; loaders take such a folder for an adapter: "
            "push them to two repositories, or the adapter with a subfolder"
        )
    api = HfApi(token=token)
    with clear_errors(repo_id, revision):
        repo_id = open_repo(api, repo_id, private=private, revision=revision)
        there = patiently(lambda: api.list_repo_files(repo_id, revision=revision))
        new = {f"{prefix}{name}" for name in files}
        stale = [n for n in there if n not in new and _is_shard_of(n, prefix)]
        return patiently(
            lambda: api.create_commit(
                repo_id,
                [
                    *(CommitOperationDelete(name) for name in stale),
                    *(CommitOperationAdd(f"{prefix}{n}", str(folder / n)) for n in files),
                ],
                commit_message=commit_message or f"Upload {kind} with hf-evopress",
                revision=revision,
                create_pr=create_pr,
            )
        )


def pull(
    repo_id: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Return `folder`, filled with the files of a repository, whole and checked.

    Downloads go to FOLDER.partial and resume there after an interruption; it becomes FOLDER
    when every file is there with the size and checksum that the Hub states.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"a repository on the Hub is named owner/name, got {repo_id!r}")
    with claimed(folder, overwrite=overwrite) as place:
        _pull(repo_id, place, revision, token, progress)
    return Path(folder)


def _pull(
    repo_id: str, folder: Path, revision: str | None, token: str | None, progress: Progress | None
) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    partial = folder.with_name(f"{folder.name}.partial")
    with clear_errors(repo_id, revision):
        api = HfApi(token=token)
        commit = patiently(lambda: api.model_info(repo_id, revision=revision)).sha
        tree = patiently(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)))
        files = {f.path: f for f in tree if hasattr(f, "blob_id")}
        check_paths(files)
        if not {*files} - {".gitattributes"}:
            raise FileNotFoundError(f"{repo_id} at {commit} is empty: nothing was pushed there yet")
        _check_space(folder.parent, sum(f.size for f in files.values()))
        wanted = sorted(set(files) - {".gitattributes"})
        for done, name in enumerate(wanted):
            if progress:
                progress(name[-40:], 0, 1)
            hf_hub_download(repo_id, name, revision=commit, local_dir=partial, token=token)
            _check_download(partial / name, files[name])
            if progress:
                progress(name[-40:], 1, 1)
                progress("files", done + 1, len(wanted))
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    _only(partial, wanted)
    check_folder(partial)
    os.chmod(partial, 0o755)
    put(partial, folder)


def check_folder(folder: str | Path) -> list[str]:
    """Return the files of a model or adapter folder, or raise ValueError for what is unsafe.

    Refused: links, files that are run or unpickled when loaded, names outside the folder, a
    shard index or plan that names such files or does not parse.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    names = []
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if (Path(place) / name).is_symlink():
                raise ValueError(f"{Path(place) / name} is a link; only whole files are shared")
        names += [(Path(place) / name).relative_to(folder).as_posix() for name in files]
    check_paths(names)
    if not {"config.json", "adapter_config.json", FILE_NAME, INDEX_NAME} & set(names):
        raise ValueError(f"{folder} holds no config.json, adapter_config.json or {FILE_NAME}")
    for name in names:
        if name.endswith(".safetensors.index.json"):
            check_shards(folder / name)
        elif PurePosixPath(name).name == FILE_NAME:
            Plan.load(folder / name)
        elif PurePosixPath(name).name == INDEX_NAME:
            read_index(read_text(folder / name), str(folder / name))
        elif PurePosixPath(name).name in ("config.json", "adapter_config.json"):
            check_config(folder / name)
    return sorted(name for name in names if name != FILES)  # a list for this disk


def check_paths(names: Iterable[str]) -> None:
    """Raise ValueError unless every name stays inside its folder and is of a kind that is data."""
    names = list(names)
    if len(names) > MAX_FILES:
        raise ValueError(f"{len(names)} files; a model has at most {MAX_FILES}")
    for name in names:
        check_path(name)
        file = PurePosixPath(name).name
        if file.endswith(RUN):
            raise ValueError(
                f"{name} can run code when it is loaded; only data is shared: leave it out"
            )
        if not file.endswith(DATA) and file not in DATA_NAMES:
            raise ValueError(f"{name} is of a kind that no model needs; known: {', '.join(DATA)}")


def check_path(name: str) -> str:
    """Return a relative path of plain parts, or raise ValueError."""
    parts = str(name).split("/")
    plain = all(_PART.fullmatch(part) and ".." not in part for part in parts)
    if not plain and name not in DATA_NAMES:
        raise ValueError(f"{name!r} is not a plain relative path")
    return name


def check_shards(index: Path) -> None:
    """Raise ValueError unless a shard index names plain .safetensors files that are beside it."""
    mapping = _json(index).get("weight_map")
    if not isinstance(mapping, dict):
        raise ValueError(f"{index} has no 'weight_map'")
    for shard in set(map(str, mapping.values())):
        if "/" in shard or not shard.endswith(".safetensors") or check_path(shard) != shard:
            raise ValueError(f"{index} names {shard!r}, which is no plain .safetensors file")
        if not (index.parent / shard).is_file():
            raise ValueError(f"{index} names {shard}, which is missing")


def check_config(path: Path) -> None:
    """Raise ValueError where a config asks for code, or holds a plan that does not parse."""
    config = _json(path)
    if config.get("auto_map"):
        raise ValueError(f"{path} asks for code from a repository (auto_map); only data is shared")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and isinstance(quantized.get("plan"), dict):
        with reading(path):
            Plan.from_dict(quantized["plan"])


def plans_in(folder: Path) -> dict[str, Plan]:
    """Return the plans of a folder that holds plans only; empty for a model or an adapter."""
    if folder.is_file():
        return {FILE_NAME: Plan.load(folder)}
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder or plan file {folder}")
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return {}
    names = [p.name for p in sorted(folder.glob("*.json")) if p.name not in (INDEX_NAME, FILES)]
    return {check_name(name): Plan.load(folder / name) for name in names}


def _json(path: Path) -> dict[str, Any]:
    return read_object(path)


def _is_shard_of(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and bool(_SHARD.fullmatch(name.removeprefix(prefix)))


def _check_space(folder: Path, n_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if n_bytes > (free := shutil.disk_usage(folder).free):
        raise OSError(f"the files need {n_bytes} bytes, {folder} has {free} free")


def _check_download(path: Path, stated: Any) -> None:
    size = path.stat().st_size
    damaged = size != stated.size or (stated.lfs and sha256(path) != stated.lfs.sha256)
    if damaged:
        path.unlink()
        raise OSError(
            f"{path.name} does not have the {stated.size} bytes or the checksum that the Hub "
            "states; it was removed: run it again"
        )


def _only(folder: Path, wanted: list[str]) -> None:
    """Remove what an earlier download of another commit left behind."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
