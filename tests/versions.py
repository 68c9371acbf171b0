"""Skip what the installed version of a library cannot do, with the version that can."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest


def is_older(package: str, than: str) -> bool:
    """Return whether the installed `package` comes before version `than`, such as 1.15."""
    found = [int(part) for part in version(package).split("+")[0].split(".")[:2]]
    return found < [int(part) for part in than.split(".")]


def needs_version(package: str, least: str, why: str) -> Any:
    """Return a mark that skips a test below a version of a library."""
    return pytest.mark.skipif(is_older(package, least), reason=f"{package} < {least}: {why}")
