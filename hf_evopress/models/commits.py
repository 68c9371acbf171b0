"""Which commit of a Hub model was read: a branch moves on, and a plan is to be made again."""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(name: str | Path, revision: str | None = None) -> str | None:
    """Return the commit of a Hub model whose config was just read; None of a folder.

    As the cache has it, so without a connection.
    """
    if Path(name).exists():
        return None
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(name), "config.json", revision=revision)
    if not isinstance(found, str):  # it was not downloaded, or it is not there
        return None
    commit = Path(found).parent.name  # .../snapshots/COMMIT/config.json
    return commit if _COMMIT.fullmatch(commit) else None
