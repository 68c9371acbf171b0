"""Run GGUF files in llama.cpp itself, as it comes with the `xllamacpp` wheel.

Its server answers requests as any program's would. Logits of every position, which the server does
not give out, come from the functions of llama.h in the same library; structures whose fields are
not needed are passed on as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROOM = 1024  # bytes for a structure of unknown fields; llama.cpp's have under 300


class _Unknown(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_uint8 * _ROOM),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("rest", ctypes.c_uint8 * _ROOM),
    )


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on the CPU."""

    def __init__(self, path: Path, *, n_context: int = 512, threads: int = 1) -> None:
        self._lib = lib = _library()
        self._model = lib.llama_model_load_from_file(
            str(path).encode(), lib.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        params = lib.llama_context_default_params()
        # the first fields of llama_context_params: n_ctx, n_batch, n_ubatch
        head = (ctypes.c_uint32 * 3).from_buffer(params)
        head[:] = [n_context, n_context, n_context]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context or lib.llama_n_ctx(self._context) < n_context:
            raise RuntimeError(f"llama.cpp makes no context of {n_context} tokens")
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_tokens = lib.llama_vocab_n_tokens(self._vocab)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Return token ids of `text`, with what the file says is added to every text."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), True, special)
        return list(room[:n])

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits at every position, (n, vocabulary) float32."""
        lib, n = self._lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        tokens, wanted = (ctypes.c_int32 * n)(*ids), (ctypes.c_int8 * n)(*[1] * n)
        batch = lib.llama_batch_get_one(tokens, n)
        batch.logits = ctypes.cast(wanted, ctypes.c_void_p)
        if (code := lib.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        found = lib.llama_get_logits(self._context)
        flat = ctypes.cast(found, ctypes.POINTER(ctypes.c_float * (n * self.n_tokens))).contents
        return torch.frombuffer(flat, dtype=torch.float32).view(n, -1).clone()

    def extend(self, ids: Sequence[int]) -> None:
        """Compute the logits after some tokens that follow those of the calls before."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self._lib.llama_batch_get_one(tokens, len(ids))
        if (code := self._lib.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def close(self) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def serve(path: Path, *, n_context: int = 512, threads: int = 1) -> Any:
    """Return llama.cpp's server for a GGUF file, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup = n_context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


def complete(server: Any, prompt: str | list[int], n_tokens: int) -> str:
    """Return the greedy continuation of a prompt, as the server makes it."""
    return server.handle_completions(
        {"prompt": prompt, "n_predict": n_tokens, "max_tokens": n_tokens, "temperature": 0.0}
    )["choices"][0]["text"]


def _library() -> Any:
    from xllamacpp import xllamacpp

    lib = ctypes.CDLL(xllamacpp.__file__)
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (_Unknown, []),
        "llama_context_default_params": (_Unknown, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Unknown]),
        "llama_init_from_model": (pointer, [pointer, _Unknown]),
        "llama_n_ctx": (ctypes.c_uint32, [pointer]),
        "llama_set_n_threads": (None, [pointer, integer, integer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_tokenize": (
            integer,
            [pointer, ctypes.c_char_p, integer, pointer, integer, ctypes.c_bool, ctypes.c_bool],
        ),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_batch_get_one": (_Batch, [pointer, integer]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits": (pointer, [pointer]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_QUIET, None)
    lib.llama_backend_init()
    return lib


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
