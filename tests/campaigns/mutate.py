"""Change files at random and read them: each is read right, or refused in a sentence.

    python -m tests.campaigns.mutate --inputs 10000 --seed 0 [--target plan config ...]

Hypothesis draws the changes: of structure in JSON and YAML (a key gone or renamed, a value of
another type), of bytes in all files. A refusal is a ValueError, TypeError or OSError that names
the file, and comes without a hang and without more memory than twice the file and a margin. What
is read is compared with what the whole file says, wherever a checksum or the logits can tell.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from hf_evopress.base.reading import _PYTHON

from .readers import Target, prepare, targets_of

REFUSALS = (ValueError, TypeError, OSError)
SECONDS = 20
MARGIN_BYTES = 96 * 2**20  # what torch and the allocator take beside the file
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([-1, 0, 1, "../../etc/passwd", "\x1b[2J", "x" * 3000, "NaN", 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@dataclass(frozen=True)
class Change:
    """One change: of bytes, or of the node that is `place` of the way through a tree."""

    kind: str
    place: float
    value: Any
    data: bytes


KINDS = ("set", "set", "delete", "rename", "byte", "cut", "insert", "remove", "fill")
CHANGES = st.builds(
    Change,
    kind=st.sampled_from(KINDS),
    place=st.floats(0, 0.999999),
    value=VALUES,
    data=st.binary(min_size=1, max_size=8),
)


def of_bytes(data: bytes, change: Change) -> bytes:
    """Return other bytes; half of the changes fall into the first 400, where headers are."""
    made, place = bytearray(data), change.place * 2 % 1
    where = int(place * (len(data) if change.place < 0.5 else min(len(data), 400)))
    new = change.data
    match change.kind:
        case "cut":
            del made[where:]
        case "insert":
            made[where:where] = new
        case "remove":
            del made[where : where + 5 * len(new)]
        case "fill":
            made[where : where + 8] = bytes([255 * (new[0] % 2)]) * 8
        case _:
            made[where : where + 1] = new[:1]
    return bytes(made)


def of_tree(tree: Any, change: Change) -> Any:
    """Return a copy of a tree with one node gone, renamed or of another value."""
    made = copy.deepcopy(tree)
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(pairs):
            nodes.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(made)
    shallow = [pair for pair in nodes if pair[0] is made]
    among = shallow if change.place < 0.3 else nodes
    node, key = among[int(change.place * 997 % 1 * len(among))]
    if change.kind == "delete":
        del node[key]
    elif change.kind == "rename" and isinstance(node, dict):
        node[f"{key}{change.data[:1].decode('latin-1')}"] = node.pop(key)
    else:
        node[key] = copy.deepcopy(change.value)
    return made


def changed(path: Path, target: Target, change: Change) -> bytes:
    """Return what a file holds after a change."""
    import yaml

    data = path.read_bytes()
    if not target.is_tree or (change.kind in KINDS[4:] and not target.part):
        return of_bytes(data, change)
    is_yaml = path.suffix == ".yaml"
    tree = yaml.safe_load(data) if is_yaml else json.loads(data)
    if target.part:
        tree[target.part] = of_tree(tree[target.part], change)
    else:
        tree = of_tree(tree, change)
    text = yaml.safe_dump(tree, allow_unicode=True) if is_yaml else json.dumps(tree)
    return text.encode("utf-8", "surrogatepass")


class Hang(BaseException):
    """Raised in whatever takes too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Bound the time of what runs inside."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def verdict(target: Target, folder: Path, expected: Any) -> str:
    """Return "read", "refused", or what is wrong with how a changed file is read."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with bounded():
            found = target.read(folder)
    except REFUSALS as error:
        said = str(error)
        if not target.is_named_in(said, folder):
            return f"names no file: {type(error).__name__}: {said[:200]}"
        if "allocate" in said or "more memory than there is" in said:
            return f"memory: {said[:200]}"
        if (_PYTHON.search(said) and "wrong type" not in said) or len(said) < 20:
            return f"unclear: {said[:200]}"
    except Hang:
        return f"hangs for {SECONDS} seconds"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    else:
        if expected is not None and not same(found, expected):
            return "read as something else"
        return _memory(target, folder, most) or "read"
    return _memory(target, folder, most) or "refused"


def _memory(target: Target, folder: Path, before: int) -> str:
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = (folder / target.file).stat().st_size
    return f"memory: {grown} bytes more" if grown > 2 * size + MARGIN_BYTES else ""


def same(one: Any, two: Any) -> bool:
    """Return whether two readings are equal, tensors by their bits."""
    import torch

    if isinstance(two, torch.Tensor):
        return isinstance(one, torch.Tensor) and torch.equal(one, two)
    if isinstance(two, dict):
        alike = isinstance(one, dict) and one.keys() == two.keys()
        return alike and all(same(one[k], two[k]) for k in two)
    return bool(one == two)


def campaign(
    inputs: int,
    *,
    seed: int = 0,
    names: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Counter[str]]:
    """Return for each kind of file how often it was read, refused, or what went wrong."""
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        whole, base = Path(place) / "whole", Path(place) / "base"
        whole.mkdir()
        prepare(whole)
        shutil.copytree(whole, base)
        targets = targets_of(base)
        for number, name in enumerate(names or targets):
            target, n = targets[name], len(names or targets)
            counts = found.setdefault(name, Counter())
            draw(
                partial(judge, target, whole, base, counts, say),
                len(range(number, inputs, n)),
                seed,
            )
            shutil.copyfile(whole / target.file, base / target.file)
            say(f"{name}: {', '.join(f'{n} {said}' for said, n in counts.most_common())}")
    return found


def judge(
    target: Target,
    whole: Path,
    base: Path,
    counts: Counter[str],
    say: Callable[[str], None],
    change: Change,
) -> None:
    """Make one change in `base`, have it read, and count what came of it."""
    expected = _expected(target, whole)
    (base / target.file).write_bytes(changed(whole / target.file, target, change))
    said = verdict(target, base, expected)
    if said not in ("read", "refused"):
        say(f"{target.file} {said}\n    {change}")
    counts[said.partition(":")[0]] += 1


@lru_cache(maxsize=1)
def _expected(target: Target, whole: Path) -> Any:
    found = target.read(whole)
    return found if target.compares else None


def draw(check: Callable[[Change], None], inputs: int, seed: int) -> None:
    """Have `check` called with `inputs` changes."""
    if not inputs:
        return
    run = settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(CHANGES)(lambda change: check(change)))
    seeded(seed)(run)()


def faults(found: dict[str, Counter[str]]) -> int:
    """Return how many changes were neither read right nor refused in a sentence."""
    fine = ("read", "refused")
    return sum(n for counts in found.values() for said, n in counts.items() if said not in fine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", nargs="*", default=[])
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    found = campaign(args.inputs, seed=args.seed, names=tuple(args.target), say=say)
    total = sum(sum(counts.values()) for counts in found.values())
    print(f"{total} inputs, {faults(found)} with faults")
    sys.exit(1 if faults(found) else 0)


if __name__ == "__main__":
    main()
