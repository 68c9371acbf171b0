"""Machine code of the CPU kernels is kept in a file, and loaded without numba."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numba
import pytest
from safetensors.torch import load_file, save_file

from hf_evopress.loading.kernels.cpu import compiled, machine_code

pytestmark = pytest.mark.skipif(
    not machine_code.is_supported(), reason="object files of Linux on x86-64 alone are known"
)

FIRST_PRODUCT = """
import sys, torch
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.plans.level import Level
from hf_evopress.methods import compose
level = Level.parse("rtn:bits=3,group_size=32")
W, x = (torch.arange(64 * 64) % 17 - 8.0).view(64, 64), torch.ones(2, 64)
layer = CompressedLinear(level, (64, 64), compose.compress(level, W, None))
layer.prepare("auto")
with torch.no_grad():
    close = torch.allclose(layer(x), x @ layer.weight.T, atol=1e-3)
print(close, layer.computes_by_kernel, "numba" in sys.modules)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def fails_on_request() -> Any:
    def check(address: int, fails: int) -> None:
        if fails:
            raise ValueError("on request")

    return numba.cfunc("void(int64, int64)")(check)


def call(entry: Any, *arguments: int) -> None:
    compiled._callable(entry, len(arguments))(*arguments)


def test_a_process_computes_with_kept_kernels_and_without_numba() -> None:
    compiled.compiled()  # which keeps them, where that was not done before
    if machine_code.load(compiled._version()) is None:
        pytest.skip("numba's cache has these kernels already, so that none are kept anew")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_PRODUCT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True", "False"]


def test_what_is_kept_is_found_by_its_version(folder: Path) -> None:
    made = machine_code.keep({"check": fails_on_request()}, 1)
    assert made is not None
    call(made["check"], 0, 0)
    found = machine_code.load(1)
    assert found is not None and found["check"].address
    call(found["check"], 0, 0)
    assert machine_code.load(2) is None


def test_a_newer_version_takes_the_place_of_an_older_one(folder: Path) -> None:
    entries = {"check": fails_on_request()}
    machine_code.keep(entries, 1)
    (folder / "kernels-of-another-machine-00000001.safetensors").touch()
    machine_code.keep(entries, 2)
    assert len(list(folder.iterdir())) == 2 and machine_code.load(1) is None


def test_another_processor_has_another_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code.keep({"check": fails_on_request()}, 1)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    assert machine_code.load(1) is None


def test_on_another_processor_numba_alone_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"check": fails_on_request()}
    machine_code.keep(entries, 1)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert machine_code.load(1) is None and machine_code.keep(entries, 2) is None
    with machine_code.one_at_a_time(2):
        assert not list(folder.glob("*.lock"))


def test_a_numba_of_other_insides_is_left_to_its_own_cache(folder: Path) -> None:
    class Unknown:
        def inspect_llvm(self) -> str:
            return "define void @check()"

    assert machine_code.keep({"check": Unknown()}, 1) is None  # no _wrapper_name


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "without names", "of text"])
def test_a_damaged_file_is_none(damage: str, folder: Path) -> None:
    machine_code.keep({"check": fails_on_request()}, 1)
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    if damage == "a flipped bit":
        data[len(data) - 64] ^= 1
        file.write_bytes(data)
    if damage == "without names":
        save_file(load_file(file), file)
    if damage == "of text":
        file.write_text("no kernels")
    assert machine_code.load(1) is None


def test_an_error_in_a_kept_function_is_said(folder: Path, capfd: Any) -> None:
    machine_code.keep({"check": fails_on_request()}, 1)
    found = machine_code.load(1)
    assert found is not None
    call(found["check"], 0, 1)
    assert "Exception ignored" in capfd.readouterr().err
    call(found["check"], 0, 0)


def test_a_function_that_calls_what_is_not_known_is_not_kept(folder: Path) -> None:
    def random(address: int, fails: int) -> None:
        print(address)

    assert machine_code.keep({"check": numba.cfunc("void(int64, int64)")(random)}, 1) is None
    assert not folder.exists()


def test_functions_from_the_cache_of_numba_are_left_as_they_are(folder: Path) -> None:
    class Cached:
        def inspect_llvm(self) -> str:
            return ""

        _wrapper_name = "check"

    assert machine_code.keep({"check": Cached()}, 1) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to this user")
def test_a_folder_that_takes_no_files_changes_nothing(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    assert machine_code.keep({"check": fails_on_request()}, 1) is not None
    assert machine_code.load(1) is None


def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine_code, "atomic_write", full)
    made = machine_code.keep({"check": fails_on_request()}, 1)
    assert made is not None and machine_code.load(1) is None
    call(made["check"], 0, 0)


def test_names_that_an_object_needs_are_read_from_it(folder: Path) -> None:
    data = machine_code._object_of(fails_on_request())
    assert "numba_unpickle" in machine_code.undefined(data)
    with pytest.raises(ValueError, match="no object file"):
        machine_code.undefined(b"MZ" + data)


WAITS = """
import sys, time
from hf_evopress.loading.kernels.cpu import machine_code
with machine_code.one_at_a_time(1):
    print("held", time.time(), flush=True)
    time.sleep(float(sys.argv[1]))
    print("left", time.time(), flush=True)
"""


def test_one_process_compiles_and_others_wait(folder: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", WAITS, "2"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline().startswith("held")
    with machine_code.one_at_a_time(1):
        now = time.time()
    left = first.communicate()[0].split()
    assert left[0] == "left" and float(left[1]) <= now
    assert not list(folder.glob("*.lock"))


def test_nobody_waits_for_a_process_that_was_killed(folder: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", WAITS, "60"], stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None and killed.stdout.readline().startswith("held")
    killed.kill()
    killed.wait()
    start = time.monotonic()
    with machine_code.one_at_a_time(1):
        assert time.monotonic() - start < 10
