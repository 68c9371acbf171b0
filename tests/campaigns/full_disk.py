"""Run commands where there is no room, and then again with room.

    python -m tests.campaigns.full_disk [--sizes 12] [--command compress ...] [--tmpfs]

A limit on the size of files stops the writes of all that is larger, and with --tmpfs (as root, on
Linux) a file system of a few hundred kilobytes is full at some byte. Each run ends in one sentence
that says so, an earlier result with the same name stays as it was, and the rerun with room ends in
the bytes of an undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .kill import COMMANDS, contents, differences, done_here, prepare, words_of

WRITING = tuple(name for name in COMMANDS if name != "push")
ROOM = 1 << 40


def run_limited(folder: Path, words: list[str], most_bytes: int) -> tuple[int, str]:
    """Return exit code and output of a command that may write files of `most_bytes` at most."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.chdir(folder)
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.close(read)
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
            from hf_evopress.cli import main

            main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with open(read, errors="replace") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def without_room(case: Path, words: list[str], most_bytes: int) -> list[str]:
    """Return what is wrong with how a command ends that finds no room; ["done"] if it did."""
    before = {name: sum_ for name, sum_ in contents(case).items() if not name.startswith("out.w")}
    code, said = run_limited(case, words, most_bytes)
    if not code:
        return ["done"]
    last = said.strip().splitlines()[-1][-500:] if said.strip() else ""
    faults = []
    if code != 1 or "no space left" not in " ".join(said.split()) or "Traceback" in said:
        faults.append(f"exit code {code}: {last}")
    after = contents(case)
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    return faults + [f"{name} is lost" for name in lost]


def campaign(
    sizes: int,
    *,
    commands: tuple[str, ...] = WRITING,
    tmpfs: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Return one line for each case, with "the same bytes" where nothing was wrong."""
    lines = []
    with tempfile.TemporaryDirectory() as place:
        given = prepare(Path(place) / "given-to-all")
        shutil.copytree(given / "given", given / "out")  # an earlier result of the same name
        for command in commands:
            reference = Path(place) / f"{command}-reference"
            shutil.copytree(given, reference)
            done_here(reference, words_of(command))
            (reference / "log.txt").unlink()
            limits = _disks(given, reference, sizes) if tmpfs else _limits(given, reference, sizes)
            for limit in limits:
                case = Path(place) / f"{command}-{limit}"
                with _disk(case, limit) if tmpfs else contextlib.nullcontext():
                    line = (
                        f"{command} {limit}: {_one(command, given, reference, case, limit, tmpfs)}"
                    )
                lines.append(line)
                say(line)
                shutil.rmtree(case, ignore_errors=True)
    return lines


def _one(command: str, given: Path, reference: Path, case: Path, limit: int, tmpfs: bool) -> str:
    shutil.copytree(given, case, dirs_exist_ok=True)
    faults = without_room(case, words_of(command), ROOM if tmpfs else limit)
    if tmpfs:
        subprocess.run(["mount", "-o", "remount,size=1g", str(case)], check=True)
    code, said = run_limited(case, words_of(command), ROOM)
    if code:
        faults.append(f"the rerun ended with {code}: {said.strip()[-500:]}")
    faults += differences(contents(reference), contents(case))
    if faults == ["done"]:
        return "had room"
    return "; ".join(faults) or "the same bytes"


def _limits(given: Path, reference: Path, sizes: int) -> list[int]:
    """Return some sizes, each of which some file of a result is a byte above."""
    new = [p for p in reference.rglob("*") if p.is_file()]
    old = {p.relative_to(given): p.stat().st_mtime for p in given.rglob("*")}
    made = {p.stat().st_size for p in new if old.get(p.relative_to(reference)) != p.stat().st_mtime}
    return _spread(sorted(size - 1 for size in made if size), sizes)


def _disks(given: Path, reference: Path, sizes: int) -> list[int]:
    """Return some sizes of disks between what is there before and what is needed."""
    least, most = (
        sum(-(-p.stat().st_size // 4096) + 1 for p in folder.rglob("*")) * 4096
        for folder in (given, reference)
    )
    step = max(4096, (most - least) // sizes)
    return [least + n * step for n in range(1, sizes + 1)]


def _spread(values: list[int], n: int) -> list[int]:
    if len(values) <= n:
        return values
    return [values[round(i * (len(values) - 1) / max(1, n - 1))] for i in range(n)]


@contextlib.contextmanager
def _disk(case: Path, size_bytes: int) -> Iterator[None]:
    case.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(case)], check=True
    )
    try:
        yield
    finally:
        subprocess.run(["umount", str(case)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--command", nargs="*", choices=WRITING, default=list(WRITING))
    parser.add_argument("--tmpfs", action="store_true")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    lines = campaign(args.sizes, commands=tuple(args.command), tmpfs=args.tmpfs, say=say)
    wrong = [line for line in lines if not line.endswith(("the same bytes", "had room"))]
    print(f"{len(lines)} cases, {len(wrong)} with faults")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
