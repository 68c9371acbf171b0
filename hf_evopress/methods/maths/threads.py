"""Threads for compiled loops that let go of Python's lock: one pool for all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache


@lru_cache(maxsize=1)
def pool(threads: int) -> ThreadPoolExecutor:
    """Return the pool of so many threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="hf-evopress")
