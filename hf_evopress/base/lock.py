"""One writer at a time: a lock file that says who holds it and is free when that process is gone.

The operating system lets go of the lock when its process ends, killed or not; what the file says
(process, machine, since when) is for the message. Where file locks do not exist the file alone
counts, and that of a process which is gone is taken over.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST}
_HELD: dict[str, int] = {}  # what this process holds -> how many times


@contextmanager
def locked(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold the lock file `path` for a while; it may be held several times by one process.

    Raises RuntimeError that names the holder of `what` where that is another process.
    """
    key = os.path.realpath(path)
    descriptor = None if key in _HELD else _take(Path(key), what)
    _HELD[key] = _HELD.get(key, 0) + 1
    try:
        yield
    finally:
        _HELD[key] -= 1
        if not _HELD[key]:
            del _HELD[key]
            _drop(Path(key), descriptor)


def _take(path: Path, what: str) -> int:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            raise OSError(
                f"{what} cannot be written, as no file can be made in {path.parent} "
                f"({os.strerror(error.errno)}): give another place"
            ) from error
        if not _is_free(descriptor):
            holder = _read(descriptor)
            os.close(descriptor)
            raise RuntimeError(
                f"{what} is being written by {_named(holder)}: wait for it, stop it, or write to "
                "another place with --out"
            )
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder removed it in between
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
    return descriptor


def _is_free(descriptor: int) -> bool:
    """Return whether the file is ours now; where no locks are known, whether its holder is gone."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    holder = _read(descriptor)
    if holder.get("host") != socket.gethostname():
        return not holder
    return holder.get("pid") == os.getpid() or not is_alive(holder.get("pid"))


def is_alive(pid: Any) -> bool:
    """Return whether a process of this machine is there."""
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is someone else's
        return True
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _drop(path: Path, descriptor: int | None) -> None:
    if descriptor is None:
        return
    path.unlink(missing_ok=True)  # while it is held: nobody else can have it
    os.close(descriptor)


def _myself() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(sys.argv)[:500],
    }


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return (
        f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')} "
        f"({holder.get('command')})"
    )
