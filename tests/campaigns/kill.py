"""Kill commands at random moments, run them again, and compare every file with an undisturbed run.

    python -m tests.campaigns.kill --kills 200 --seed 0 [--command compress ...]

The undisturbed run is this process's; the others are forked from it, so that a kill falls into
their work and not into imports. Each case has a folder of its own with the same relative names, so
files have to be equal to the byte: all of the result and all of the work folder. Between kill and
rerun the result is absent or whole, and nothing that was there before is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
QUICK = "--data text.txt --seq-len 32 --calibration 4"
LEVELS = (
    "gptq:bits=3,group_size=32",
    "rtn:bits=5,group_size=32",
    "sparsegpt:sparsity=0.5",
    "sparsegpt:sparsity=0.5,bits=4,group_size=32",
    "lowrank:rank=8",
    "trellis:bits=2,state_bits=10",
    "gptq:bits=2,group_size=32 + lowrank:rank=4",
)
SEARCH = f"--search-pool 4 --generations 1 {QUICK}"
COMMANDS = {
    "compress": f"compress dense --bits 4.5 --drop mlp {SEARCH} --out out",
    "refine": f"refine given/evopress_plan.json --mode fast {QUICK} --out out",
    "distil": f"refine given --mode end-to-end --model dense --steps 4 {QUICK} --out out",
    "export": "export given --format dense --out out",
    "merge": "merge given adapter --exact --out out",
    "push": "push given me/small",
    "stack": f"stack dense --blocks 3 --ends rtn:bits=6,group_size=32 {QUICK} --out out",
}


@dataclass(frozen=True)
class Outcome:
    """What one kill did: after which share of the run, by what, and what was wrong, if anything."""

    command: str
    share: float
    signal: str
    was_running: bool
    faults: tuple[str, ...]


def words_of(command: str) -> list[str]:
    words = COMMANDS[command].split()
    return words + ([x for level in LEVELS for x in ("--level", level)] * (command == "compress"))


def forked(folder: Path, words: list[str]) -> int:
    """Return the number of a new process that runs a command line in `folder`."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from tqdm import tqdm

        from hf_evopress.cli import main

        # tqdm's own lock is shared by forks: one that is killed holding it would stop all others
        tqdm.set_lock(threading.RLock())

        main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def done_here(folder: Path, words: list[str]) -> None:
    """Run a command line in `folder` in this process: forks find what it imports and compiles."""
    from hf_evopress.cli import main

    with contextlib.chdir(folder), open("log.txt", "a") as log:
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                main(words)
        except SystemExit as end:
            if end.code:
                said = (folder / "log.txt").read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{' '.join(words)} ended with {end.code}: {said}") from end


def finished(folder: Path, words: list[str]) -> float:
    """Return the seconds that a command took to its end; RuntimeError with its log if it failed."""
    start = time.perf_counter()
    _, status = os.waitpid(forked(folder, words), 0)
    if status:
        log = (folder / "log.txt").read_text(errors="replace").strip()[-500:]
        raise RuntimeError(
            f"{' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}: {log}"
        )
    return time.perf_counter() - start


def killed(folder: Path, words: list[str], after: float, by: int) -> bool:
    """Run a command and end it after some seconds; return whether it was still running then."""
    pid = forked(folder, words)
    end = time.perf_counter() + after
    while time.perf_counter() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(pid, by)
    os.waitpid(pid, 0)
    return True


def contents(folder: Path) -> dict[str, str]:
    """Return file -> digest of all that a run leaves; logs and times are no results."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "log.txt" or name.endswith(".jsonl"):  # the search's log holds seconds
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_whole(folder: Path) -> list[str]:
    """Return what is wrong with a result right after a kill: nothing if absent or whole."""
    out = folder / "out"
    if not out.exists():
        return []
    listed = json.loads((out / "evopress_files.json").read_text())["files"]
    return [f"{name} is missing after the kill" for name in listed if not (out / name).is_file()]


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    kinds = {
        "is missing": expected.keys() - found.keys(),
        "is left over": found.keys() - expected.keys(),
        "differs": {n for n in expected.keys() & found.keys() if expected[n] != found[n]},
    }
    return [f"{name} {what}" for what, names in kinds.items() for name in sorted(names)]


def prepare(folder: Path) -> Path:
    """Return a folder with a dense model, a compressed one, an adapter and a text."""
    import torch

    from hf_evopress.adapters.folder import write_adapter
    from hf_evopress.models.units import find_units

    from ..conftest import byte_level_tokenizer, make_structured_text, make_tiny_model

    model: Any = make_tiny_model("llama", max_position_embeddings=64).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    byte_level_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(make_structured_text(120))
    generator = torch.Generator().manual_seed(0)
    factors = {
        u.name: (
            torch.randn(2, u.shape[1], generator=generator) / 50,
            torch.randn(u.shape[0], 2, generator=generator) / 50,
        )
        for u in find_units(model)
    }
    write_adapter(
        folder / "adapter", {n: (a.bfloat16(), b.bfloat16()) for n, (a, b) in factors.items()}
    )
    given = f"compress dense --bits 4.5 {SEARCH} --work first --out given".split()
    done_here(folder, [*given, *(x for level in LEVELS[:2] for x in ("--level", level))])
    shutil.rmtree(folder / "first")
    return folder


@contextlib.contextmanager
def loopback() -> Iterator[Any]:
    """A hub of this process that forked ones push to."""
    from huggingface_hub import constants

    from ..hub_server import Hub

    with Hub() as hub:
        constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = hub.url, True
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=hub.token, HF_HUB_DISABLE_XET="1")
        yield hub


def pushed(hub: Any) -> dict[str, str]:
    if "me/small" not in hub.repos:
        return {}
    files = hub.files("me/small")
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def campaign(
    kills: int,
    *,
    seed: int = 0,
    commands: tuple[str, ...] = tuple(COMMANDS),
    signals: tuple[int, ...] = SIGNALS,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Return what `kills` kills, spread over commands and signals in turn, have shown."""
    rng = random.Random(seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as place, loopback() as hub:
        given = prepare(Path(place) / "given-to-all")
        for command in commands:
            n = len(range(commands.index(command), kills, len(commands)))
            if not n:
                continue
            reference = Path(place) / f"{command}-reference"
            shutil.copytree(given, reference)
            done_here(reference, words_of(command))
            expected = {**contents(reference), **pushed(hub)}
            seconds = _checked_seconds(command, given, expected, hub)
            for _ in range(n):
                by = signals[len(outcomes) // len(commands) % len(signals)]
                case = Path(place) / f"{command}-{len(outcomes)}"
                shutil.copytree(given, case)
                outcome = one_kill(command, case, rng.random(), seconds, by, expected, hub)
                outcomes.append(outcome)
                said = "; ".join(outcome.faults) or "the same bytes"
                say(f"{command} {outcome.signal} at {outcome.share:.0%}: {said}")
                shutil.rmtree(case)
    return outcomes


def _checked_seconds(command: str, given: Path, expected: dict[str, str], hub: Any) -> float:
    """Return the seconds of a whole run in a fork, after checking that its files are the same."""
    hub.repos.clear()
    case = given.with_name(f"{command}-whole")
    shutil.copytree(given, case)
    seconds = finished(case, words_of(command))
    if faults := differences(expected, {**contents(case), **pushed(hub)}):
        raise RuntimeError(f"two undisturbed runs of {command} differ: {'; '.join(faults)}")
    hub.repos.clear()
    return seconds


def one_kill(
    command: str,
    case: Path,
    share: float,
    seconds: float,
    by: int,
    expected: dict[str, str],
    hub: Any,
) -> Outcome:
    """Return what a kill after `share` of the `seconds` of a run in `case` has shown."""
    words = words_of(command)
    was_running = killed(case, words, share * seconds, by)
    faults = check_whole(case)
    try:
        finished(case, words)
        faults += differences(expected, {**contents(case), **pushed(hub)})
    except RuntimeError as error:
        faults.append(str(error))
    hub.repos.clear()
    name = signal.Signals(by).name
    return Outcome(command, round(share, 3), name, was_running, tuple(faults))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", nargs="*", choices=list(COMMANDS), default=list(COMMANDS))
    args = parser.parse_args()
    import hf_evopress.jobs.pipeline  # noqa: F401  before the forks

    def say(line: str) -> None:
        print(line, flush=True)

    outcomes = campaign(args.kills, seed=args.seed, commands=tuple(args.command), say=say)
    wrong = [o for o in outcomes if o.faults]
    running = sum(o.was_running for o in outcomes)
    print(f"{len(outcomes)} kills, {running} while it ran, {len(wrong)} with faults")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
