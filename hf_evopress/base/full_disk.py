"""Say that the disk is full, whatever the library says that noticed it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NUMBERS = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
# safetensors and torch have the operating system's words in errors of their own
_WORDS = re.compile(
    r"no space left|file too large|disk quota exceeded|os error (27|28|122)\b|"
    r"PytorchStreamWriter failed|file write failed|inline_container\S+ \. unexpected pos",
    re.IGNORECASE,
)


class DiskFull(OSError):
    """Raised where a file could not be written for lack of space; names the place."""


@contextmanager
def space_for(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make an error of a full disk a DiskFull that says where, and how to go on.

    Nothing that was finished is lost by it: files and folders are written under another name
    and take their own when they are whole.
    """
    try:
        yield
    except Exception as error:
        if _is_full(error) and not isinstance(error, DiskFull):
            raise DiskFull(
                f"{path} cannot be written: no space left on its disk, or a limit on the size of "
                f"files ({_free(Path(path))}). What was finished is kept: make room, or take "
                "another place with --out and --work, and run the same again"
            ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if _WORDS.search(str(error)):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    return f"{shutil.disk_usage(path).free} bytes free"
