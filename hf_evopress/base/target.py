"""What a result may be written over: nothing of the user's, and of an earlier result its own files.

A result folder lists the files that were written to it in evopress_files.json. The next result
with that name replaces those and keeps what others have put beside them. Any other folder that is
not empty is refused unless `overwrite` is said, and a folder that is read (the model, the work
folder, texts) or holds what is read is refused in any case.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from .full_disk import space_for
from .lock import locked
from .resources import atomic_write, fsync, umask

FILES = "evopress_files.json"  # what was written to a result folder
_NAMED = re.compile(
    r"evopress_\w+\.(json|yaml|png)|kappa\.json"
)  # written beside a result later on
_LEFT = re.compile(r"\..+\.([a-z0-9_]{8}\.tmp(\.\w+)?|evopress-new-\w+)")  # of killed processes
_CARD, _MARK = "README.md", b"<!-- written by hf-evopress"

F = TypeVar("F", bound=Callable[..., Any])

_overwritten: set[str] = set()  # targets of which this process may replace all


@contextmanager
def claimed(
    out: str | os.PathLike[str], *, reads: Iterable[Any] = (), overwrite: bool = False
) -> Iterator[Path]:
    """Hold the folder `out` for what is about to be made; yield its real path.

    Checks at once what `check_target` checks, and that no other process writes there.
    """
    folder = check_target(out, reads=reads, overwrite=overwrite)
    with space_for(out), locked(_beside(folder, "lock"), str(out)):
        _recover(folder)
        before = set(_overwritten)
        if overwrite:
            _overwritten.add(str(folder))
        try:
            yield folder
        finally:
            _overwritten.intersection_update(before)


def writes_out(*reads: str) -> Callable[[F], F]:
    """Return a decorator: `out` of a function is claimed while it runs, `overwrite` is its word.

    reads: names of its arguments that say what it reads.
    """

    def decorate(function: F) -> F:
        known = signature(function)

        @wraps(function)
        def claiming(*args: Any, **kwargs: Any) -> Any:
            bound = known.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            read = [item for name in reads for item in _each(given[name])]
            with claimed(given["out"], reads=read, overwrite=given["overwrite"]):
                return function(*args, **kwargs)

        return claiming  # type: ignore[return-value]

    return decorate


def _each(value: Any) -> list[Any]:
    """Return what an argument names: itself, or the items of a list or mapping."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_target(
    out: str | os.PathLike[str], *, reads: Iterable[Any] = (), overwrite: bool = False
) -> Path:
    """Return the real path of `out`, a folder to write a result to, or raise ValueError.

    reads: files and folders that are needed, None and names on the Hub among them.
    """
    folder = real_path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    for name in reads:
        if name is None or not os.path.exists(os.path.expanduser(name)):
            continue
        real = real_path(name)
        if real == folder:
            raise ValueError(f"{out} is {name}, which is read: give another folder to write to")
        if folder in real.parents:
            raise ValueError(f"{out} holds {name}, which is read: give another folder to write to")
    if folder in (Path.home(), *Path.home().parents):
        raise ValueError(f"{out} is no folder for one result: name a folder inside it")
    if foreign := [] if overwrite or str(folder) in _overwritten else _foreign(folder):
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ValueError(
            f"{out} holds files that no hf-evopress command wrote there "
            f"({', '.join(foreign[:3])}{more}): give another folder, or say --overwrite to "
            "replace all that is in it"
        )
    return folder


def check_file(
    path: str | os.PathLike[str], mark: bytes | None, *, overwrite: bool = False
) -> None:
    """Raise ValueError where the file `path` is there and not ours.

    mark: what the first megabyte of such a file of ours holds; None where nothing tells it.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a file to write")
    if path.is_file() and path.stat().st_size and not overwrite:
        with open(path, "rb") as file:
            if mark is None or mark not in file.read(1 << 20):
                raise ValueError(
                    f"{path} is there and does not look like a file of hf-evopress: give another "
                    "one, or say --overwrite to replace it"
                )


@contextmanager
def whole_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when all went well, and is gone if not.

    Of an earlier result in `out` its own files go, and what others added stays.
    """
    overwrite = str(real_path(out)) in _overwritten
    with claimed(out, overwrite=overwrite) as folder:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_beside(folder, "new-").name))
        try:
            yield temporary
            os.chmod(temporary, 0o755)
            usual = 0o666 & ~umask()
            for path in temporary.rglob("*"):
                if path.is_file():  # safetensors from 0.8 on lets only the owner read
                    os.chmod(path, path.stat().st_mode | usual)
            put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def work_beside(out: str | os.PathLike[str]) -> Path:
    """Return OUT.work, also of an `out` with a slash behind it or one called `.`."""
    path = Path(out)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_name(f"{path.name}.work")


def real_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path without links, of what is there or will be."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _foreign(folder: Path) -> list[str]:
    """Return names in a folder that holds no earlier result, none if it does."""
    if not folder.is_dir() or (folder / FILES).is_file():
        return []
    return sorted(p.name for p in folder.iterdir() if not _LEFT.fullmatch(p.name))


def _is_ours(path: Path) -> bool:
    """Return whether something in a result folder is ours by its name or mark, listed or not."""
    if path.name == _CARD and path.is_file():
        return _MARK in path.read_bytes()
    return bool(_NAMED.fullmatch(path.name) or _LEFT.fullmatch(path.name))


def _list_files(folder: Path) -> None:
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    atomic_write(folder / FILES, json.dumps({"files": names}, indent=1) + "\n")


def _listed(folder: Path) -> set[str]:
    """Return the files that an earlier result wrote; its list is data, so names stay inside."""
    try:
        found = json.loads((folder / FILES).read_text(encoding="utf-8"))["files"]
        return {str(name) for name in found}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def put(temporary: Path, folder: Path) -> None:
    """Put a whole new folder in the place of `folder`, with what others have added to that.

    `folder` is claimed, and both are on one file system.
    """
    _list_files(temporary)
    for file in _files(temporary):
        if file.is_file():
            fsync(file)
    is_all_ours = str(folder) in _overwritten
    added = [] if is_all_ours or not folder.is_dir() else _added(folder)
    if clash := [name for name in added if (temporary / name).exists()]:
        raise ValueError(
            f"{folder} holds {clash[0]}, which hf-evopress did not write: move it away"
        )
    for name in added:
        _keep(folder / name, temporary / name)
    here = Path.cwd()
    if folder.is_dir() and (os.path.ismount(folder) or folder in (here, *here.parents)):
        return _put_inside(temporary, folder, set(added))
    old = _beside(folder, "old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _put_inside(temporary: Path, folder: Path, added: set[str]) -> None:
    """As `put`, of a folder that cannot be renamed: a mount, or where the process is."""
    new = Path(tempfile.mkdtemp(dir=folder, prefix=_beside(folder, "new-").name))
    shutil.copytree(temporary, new, dirs_exist_ok=True)
    made = {p.relative_to(new).as_posix() for p in new.rglob("*") if not p.is_dir()}
    gone = [p for p in _files(folder) if p.relative_to(folder).as_posix() not in made | added]
    for name in sorted(made):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
    for path in gone:
        path.unlink(missing_ok=True)
    for place in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        if not place.is_symlink() and not any(place.iterdir()):
            place.rmdir()


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]


def _added(folder: Path) -> list[str]:
    """Return the files in a result folder that it does not list and that are not ours."""
    listed = _listed(folder)
    names = [p.relative_to(folder).as_posix() for p in _files(folder)]
    return sorted(n for n in names if n not in listed and not _is_ours(folder / n.split("/")[0]))


def _keep(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _recover(folder: Path) -> None:
    """Finish or undo what a killed process left beside `folder`; its lock is held."""
    old = _beside(folder, "old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    for path in folder.parent.glob(f"{glob.escape(_beside(folder, 'new-').name)}*"):
        shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.evopress-{what}")
