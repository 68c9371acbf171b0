"""Loads and stores at addresses, a counter for threads, a call of a function by its address."""

from __future__ import annotations

from typing import Any


def intrinsics() -> dict[str, Any]:
    """Return name -> function for numba code; integers are int64 whatever their memory holds."""
    from llvmlite import ir
    from numba import types

    made: dict[str, Any] = {"get": _get(), "take": _take(), "call": _call()}
    for name, bits, is_signed in (("u8", 8, False), ("u16", 16, False), ("i32", 32, True)):
        made[name] = _load(ir.IntType(bits), types.int64, is_signed)
        made[f"set_{name}"] = _store(ir.IntType(bits), types.int64)
    for name, kind, number in (
        ("i64", ir.IntType(64), types.int64),
        ("f32", ir.FloatType(), types.float32),
    ):
        made[name], made[f"set_{name}"] = _load(kind, number, True), _store(kind, number)
    return made


def _load(kind: Any, number: Any, is_signed: bool) -> Any:
    """f(address) -> the number of this kind at an address, of any alignment."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    wide = ir.IntType(64)

    def typing(context: Any, address: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            value = b.load(b.inttoptr(arguments[0], kind.as_pointer()), align=1)
            if number is types.float32 or kind == wide:
                return value
            return b.sext(value, wide) if is_signed else b.zext(value, wide)

        return number(types.int64), emit

    return intrinsic(typing)


def _store(kind: Any, number: Any) -> Any:
    """f(address, number): the low bits of an integer are kept."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def typing(context: Any, address: Any, value: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            address, value = arguments
            if number is not types.float32 and kind != ir.IntType(64):
                value = b.trunc(value, kind)
            b.store(value, b.inttoptr(address, kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, number), emit

    return intrinsic(typing)


def _get() -> Any:
    """get(task, i) -> the i-th int64 of a task."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    i64 = ir.IntType(64)

    def typing(context: Any, task: Any, i: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            task, i = arguments
            place = b.add(task, b.mul(i, ir.Constant(i64, 8)))
            return b.load(b.inttoptr(place, i64.as_pointer()), align=8)

        return types.int64(types.int64, types.int64), emit

    return intrinsic(typing)


def _take() -> Any:
    """take(a, n) -> the number at address a, which grows by n for all threads."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    i64 = ir.IntType(64)

    def typing(context: Any, a: Any, n: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            place = b.inttoptr(arguments[0], i64.as_pointer())
            return b.atomic_rmw("add", place, arguments[1], "monotonic")

        return types.int64(types.int64, types.int64), emit

    return intrinsic(typing)


def _call() -> Any:
    """call(parallel, work, data, n): work(data), by GOMP_parallel on each of n > 1 threads."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    i8, i32, i64 = (ir.IntType(n) for n in (8, 32, 64))
    any_, nothing = i8.as_pointer(), ir.VoidType()
    alone = ir.FunctionType(nothing, [any_]).as_pointer()
    shared = ir.FunctionType(nothing, [any_, any_, i32, i32]).as_pointer()

    def typing(context: Any, parallel: Any, work: Any, data: Any, n: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            parallel, work, data, n = arguments
            pointer = b.inttoptr(data, any_)
            with b.if_else(b.icmp_signed(">", n, ir.Constant(i64, 1))) as (several, one):
                with several:
                    threads = [b.trunc(n, i32), ir.Constant(i32, 0)]
                    b.call(
                        b.inttoptr(parallel, shared), [b.inttoptr(work, any_), pointer, *threads]
                    )
                with one:
                    b.call(b.inttoptr(work, alone), [pointer])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), emit

    return intrinsic(typing)
