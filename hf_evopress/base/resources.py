"""Files and sizes: atomic writes, checksums, sizes as people write them, bundled files."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .full_disk import space_for
from .lock import is_alive

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter] = _UNITS[_letter + "B"] = 1000**_power
    _UNITS[_letter + "IB"] = 1024**_power

# in the names of temporary files, beside the process: who may remove them
_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Return a number of bytes: parse_size("90MB") == 90_000_000, parse_size("1GiB") == 2**30."""
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ValueError(f"a size in bytes cannot be negative, got {text}")
        return text
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"not a size: {text!r}; write a number of bytes or a number with a unit, "
            "such as 90MB (1000-based) or 90MiB (1024-based)"
        )
    # A float would lose bytes above 2**53; whole numbers stay integers.
    number, factor = match[1], _UNITS[match[2].upper()]
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def format_size(size_bytes: int) -> str:
    """Return a size for people, 1000-based: format_size(90_500_000) == "90.5 MB"."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def clear_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files and folders that killed processes of this machine left there."""
    for path in Path(folder).glob(f".*.{_MACHINE}-*.tmp*"):
        pid = path.name.rpartition(f".{_MACHINE}-")[2].partition(".")[0]
        if pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def scratch_folder(folder: str | os.PathLike[str], name: str) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder in `folder`, which `clear_leftovers` knows by its name."""
    return tempfile.TemporaryDirectory(dir=folder, prefix=_prefix(name), suffix=".tmp")


def _prefix(name: str) -> str:
    return f".{name}.{_MACHINE}-{os.getpid()}."


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there becomes `path`, or nothing does.

    On success the file is fsynced and renamed (readers see the old file or the new one, never a
    part); on any error, a full disk included, the temporary file is removed and `path` is as it
    was. Missing parent folders are made.
    """
    target = Path(path)
    with space_for(target):
        yield from _beside(target)


def _beside(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent,
        prefix=_prefix(target.name),
        suffix=".tmp" + target.suffix,
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp files are private (0600); a shared folder needs the usual permissions.
        os.chmod(temporary, 0o666 & ~umask())
        fsync(temporary)
        os.replace(temporary, target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path` as a whole or not at all, and return the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits; reads it in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def bundled(folder: str) -> Path:
    """Return the folder "recipes" or "model_cards", inside a wheel or beside a checkout."""
    package = Path(__file__).resolve().parent.parent
    for place in (package / f"_{folder}", package.parent / folder):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"the folder {folder!r} is not part of this installation of {package}")


def umask() -> int:
    """Return the permissions that this process takes from new files."""
    current = os.umask(0o022)
    os.umask(current)
    return current


def fsync(path: Path) -> None:
    """Have what was written to a file or folder on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and needs no such call to keep a rename
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
