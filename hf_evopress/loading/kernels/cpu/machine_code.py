"""The machine code of the compiled kernels, kept in a file and loaded without numba.

numba keeps what it compiles as well, but to read it takes its import and its tables of types, most
of the time to a model's first token. LLVM, which numba brings, loads an object file by itself.
On Linux on x86-64 only; elsewhere, and where a file cannot be written or read, numba's own cache
serves.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import sysconfig
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ....base.resources import atomic_write

logger = logging.getLogger(__name__)

# What the errors of compiled functions need. Python's are there in each process; numba's are put
# in here: they say "no more is known of it", and Python's then say that there was an error.
_OF_PYTHON = (
    *("PyBytes_FromStringAndSize", "PyErr_Clear", "PyErr_SetNone", "PyErr_SetString"),
    *("PyErr_WriteUnraisable", "PyExc_RuntimeError", "PyExc_StopIteration", "PyExc_SystemError"),
    *("PyUnicode_FromString", "Py_DecRef", "PyGILState_Ensure", "PyGILState_Release"),
)
_OF_NUMBA = ("NRT_Free", "numba_do_raise", "numba_runtime_build_excinfo_struct", "numba_unpickle")
_GIL = ("numba_gil_ensure", "numba_gil_release")
_ELF, _SYMBOLS, _UNDEFINED = b"\x7fELF\x02\x01", 2, 0  # of 64 bits, least bytes first
_MOST_WAITING = 300.0  # seconds
# The last two are of a numba or llvmlite whose insides are others: then its own cache serves.
_FAULTS = (
    *(OSError, SafetensorError, ValueError, KeyError, RuntimeError, ImportError),
    *(AttributeError, TypeError),
)


class Entry(NamedTuple):
    """A compiled function: where it begins, and what owns its code."""

    address: int
    owner: Any


def load(version: int) -> dict[str, Entry] | None:
    """Return the functions that were kept for this processor and `version`, None if there are none.

    A file that is damaged is none.
    """
    if not is_supported():
        return None
    try:
        name = _file_name(version)
        for folder in _folders():
            if (file := folder / name).is_file():
                return _linked(*_read(file))
    except _FAULTS as error:
        logger.info("kept kernels cannot be used (%s: %s)", type(error).__name__, error)
    return None


def keep(entries: Mapping[str, Any], version: int) -> dict[str, Entry] | None:
    """Return the functions that numba has just compiled as `load` will, after keeping them.

    Where no folder takes a file they serve this process. None where numba read them from its own
    cache, or they need what is not known here.
    """
    if not is_supported():
        return None
    try:
        objects = {name: _object_of(entry) for name, entry in entries.items()}
        symbols = {name: _symbol_of(entry) for name, entry in entries.items()}
        if not all(objects.values()):
            return None
        made = _linked(objects, symbols)
        _write(objects, symbols, _file_name(version))
        return made
    except _FAULTS as error:
        logger.info("kernels are not kept (%s: %s)", type(error).__name__, error)
        return None


@contextmanager
def one_at_a_time(version: int) -> Iterator[None]:
    """Let one process of this machine compile while others wait for what it keeps.

    They wait for five minutes, and not where files cannot be made or locked.
    """
    lock = _lock_file(version) if is_supported() else None
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        until = time.monotonic() + _MOST_WAITING
        while time.monotonic() < until and not _is_ours(file):
            time.sleep(0.1)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lock_file(version: int) -> Path | None:
    """Return the file to lock, in the first folder that takes files."""
    with suppress(*_FAULTS):
        name = f"{_file_name(version)}.lock"
        for folder in _folders():
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).touch()
                return folder / name
    return None


def _is_ours(file: Any) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        pass
    return True


def is_supported() -> bool:
    """Return whether object files of this system are known here.

    Of other processors than x86-64 they were never loaded, and LLVM ends the process where it
    cannot place one.
    """
    is_x86 = platform.machine() == "x86_64" and sys.maxsize > 2**32
    return sys.platform == "linux" and is_x86


# -- the file --------------------------------------------------------------------------------


def _file_name(version: int) -> str:
    """Return the name of the file for a version of the kernels on this processor."""
    llvm = _llvm()
    versions = sys.implementation.cache_tag, import_module("llvmlite").__version__
    machine = sysconfig.get_platform(), *versions, _processor(llvm), _features(llvm)
    own = hashlib.sha256(repr(machine).encode()).hexdigest()[:12]
    return f"kernels-{own}-{version:08x}.safetensors"


def _folders() -> Iterator[Path]:
    """Yield where kernels are kept: where numba is told to, beside this file, for the user."""
    if told := os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(told)
        return
    yield Path(__file__).parent / "__pycache__"
    yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_evopress"


def _write(objects: Mapping[str, bytes], symbols: Mapping[str, str], name: str) -> None:
    """Write a file to the first folder that takes it, and remove those of other versions."""
    tensors = {k: torch.frombuffer(bytearray(v), dtype=torch.uint8) for k, v in objects.items()}
    data = save(tensors, {**symbols, "crc32": str(_checksum(objects, symbols))})
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / name, data)
        except OSError as error:
            logger.info("kernels are not kept in %s (%s)", folder, error)
            continue
        for other in folder.glob(f"{name.rpartition('-')[0]}-*.safetensors"):
            if other.name != name:
                other.unlink(missing_ok=True)
        return


def _read(file: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        symbols = dict(opened.metadata() or {})
        objects = {k: opened.get_tensor(k).numpy().tobytes() for k in opened.keys()}  # noqa: SIM118
    said = int(symbols.pop("crc32"))
    if said != _checksum(objects, symbols) or set(symbols) != set(objects):
        raise ValueError(f"{file} is damaged")
    return objects, symbols


def _checksum(objects: Mapping[str, bytes], symbols: Mapping[str, str]) -> int:
    total = 0
    for name in sorted(objects):
        total = zlib.crc32(f"{name} {symbols[name]} ".encode(), total)
        total = zlib.crc32(objects[name], total)
    return total


# -- LLVM ------------------------------------------------------------------------------------


def _llvm() -> Any:
    return import_module("llvmlite.binding")


def _processor(llvm: Any) -> str:
    return os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()


def _features(llvm: Any) -> str:
    told = os.environ.get("NUMBA_CPU_FEATURES")
    return llvm.get_host_cpu_features().flatten() if told is None else told


def _machine(llvm: Any) -> Any:
    """Return a target machine with the settings of numba's."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=_processor(llvm),
        features=_features(llvm),
        opt=3,
        reloc="static",
        codemodel="jitdefault",
        jit=True,
    )


def _object_of(entry: Any) -> bytes:
    """Return the object file of a numba.cfunc, nothing where it came from numba's cache."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of code from the cache, which cannot be inspected
        text = entry.inspect_llvm()
    if _symbol_of(entry) not in text:
        return b""
    llvm = _llvm()
    data: bytes = _machine(llvm).emit_object(llvm.parse_assembly(text))
    if unknown := undefined(data) - {*_OF_PYTHON, *_OF_NUMBA, *_GIL}:
        raise ValueError(f"compiled kernels call {', '.join(sorted(unknown))}")
    return data


def _symbol_of(entry: Any) -> str:
    return str(entry._wrapper_name)


def undefined(data: bytes) -> set[str]:
    """Return the names that an ELF object file needs from elsewhere (System V ABI, chapter 4)."""
    if data[:6] != _ELF:
        raise ValueError("no object file of this system")
    word = lambda at, size: int.from_bytes(data[at : at + size], "little")  # noqa: E731
    start, entry_size, count = word(0x28, 8), word(0x3A, 2), word(0x3C, 2)
    sections = [start + i * entry_size for i in range(count)]
    found = set()
    for section in (s for s in sections if word(s + 4, 4) == _SYMBOLS):
        names = word(sections[word(section + 0x28, 4)] + 0x18, 8)
        begin, size = word(section + 0x18, 8), word(section + 0x20, 8)
        for symbol in range(begin + 24, begin + size, 24):  # the first one is of no name
            if word(symbol + 6, 2) == _UNDEFINED:
                at = names + word(symbol, 4)
                found.add(data[at : data.index(b"\0", at)].decode())
    return found


def _linked(objects: Mapping[str, bytes], symbols: Mapping[str, str]) -> dict[str, Entry]:
    """Return the functions of object files, ready to be called."""
    llvm = _llvm()
    machine = _machine(llvm)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_stubs()), machine)
    # LLVM ends the process where one is not there
    if missing := [name for name in _OF_PYTHON if not llvm.address_of_symbol(name)]:
        raise RuntimeError(f"this Python has no {', '.join(missing)}")
    for data in objects.values():
        engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()
    made = {k: Entry(engine.get_function_address(symbols[k]), engine) for k in objects}
    if not all(entry.address for entry in made.values()):
        raise RuntimeError("kept kernels lack a function")
    return made


def _stubs() -> str:
    """Return what stands for numba's own functions, as LLVM's assembly of this version."""
    ir = import_module("llvmlite.ir")
    i32, i64 = ir.IntType(32), ir.IntType(64)
    module = ir.Module("stubs")
    module.triple = _llvm().get_process_triple()

    def function(name: str, returned: Any, *arguments: Any) -> Any:
        return ir.Function(module, ir.FunctionType(returned, arguments), name)

    def body(of: Any) -> Any:
        return ir.IRBuilder(of.append_basic_block())

    for name in _OF_NUMBA:
        body(function(name, i64)).ret(ir.Constant(i64, 0))
    ensure, release = function("PyGILState_Ensure", i32), function("PyGILState_Release", i64, i32)
    made = function(_GIL[0], i64, i64)  # of the address that the state is put to
    build = body(made)
    build.store(build.call(ensure, ()), build.inttoptr(made.args[0], i32.as_pointer()))
    build.ret(ir.Constant(i64, 0))
    made = function(_GIL[1], i64, i64)
    build = body(made)
    build.call(release, (build.load(build.inttoptr(made.args[0], i32.as_pointer())),))
    build.ret(ir.Constant(i64, 0))
    return str(module)
