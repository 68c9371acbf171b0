"""Viterbi's algorithm on a CPU: eight walks side by side, one vector instruction for all of them.

Costs lie as (state, walk), so a vector holds one state of eight walks: no shuffles, whatever the
rate. The step is written in LLVM's own terms, because compilers do not find it: 4 to 8 times the
speed of the same loop in C, a walk at a time, by gcc -O3 -march=native with AVX2.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .threads import pool
from .walks import own_bits

LANES = 8
PAD = 2  # states
_of_thread = threading.local()  # memory to work in, kept from call to call
_NEVER = 1e30  # more than any walk costs


def nearest_walks(x: Tensor, values: Tensor, bits: float, past: Tensor | None = None) -> Tensor:
    """Return the states (n, length) int32 of the cheapest walks along x (n, length) float32.

    As `viterbi.nearest_walks`; on torch.get_num_threads() threads. Memory per thread:
    8 * (length * 2^(L - k) + 8 * 2^L) bytes.
    """
    n, length = x.shape
    states = np.empty((-(-n // LANES), LANES, length), np.int32)
    targets = np.zeros((len(states) * LANES, length), np.float32)
    targets[:n] = x.detach().numpy()
    # (groups, length, lanes): a vector is one weight of eight walks
    targets = np.ascontiguousarray(targets.reshape(-1, LANES, length).transpose(0, 2, 1))
    pasts: np.ndarray = np.full(len(states) * LANES, -1, np.int32)
    if past is not None:
        pasts[:n] = past.numpy()
    pasts = pasts.reshape(-1, LANES)
    table = np.ascontiguousarray(values.numpy(), np.float32)
    threads = max(1, min(torch.get_num_threads(), len(states)))
    own = own_bits(bits)
    walk = _compiled(*own)

    def work(first: int) -> None:
        space = _workspace(len(table), own, length)
        for group in range(first, len(states), threads):
            walk(targets[group], table, pasts[group], *space, states[group])

    if threads == 1:
        work(0)
    else:
        list(pool(threads).map(work, range(threads)))
    return torch.from_numpy(states.reshape(-1, length)[:n])


@lru_cache(maxsize=None)
def _compiled(even: int, odd: int) -> Any:
    """Return the walk for this rate, compiled once per process (about a second).

    even, odd: the bits that even and odd weights bring.
    """
    from numba import njit

    step_even, step_odd = _step(even), _step(odd)

    @njit(nogil=True)  # type: ignore[untyped-decorator]
    def walk(x, values, pasts, cost, new_cost, came_from, states):  # type: ignore[no-untyped-def]
        length, n_states = x.shape[0], values.shape[0]
        of_even, of_odd = n_states >> even, n_states >> odd  # pasts
        # The ways into a state lie as many states apart as there are pasts; PAD more, and they
        # share no cache set. So costs are written as the next step reads them.
        pad = PAD if 1 << odd <= of_odd else 0
        for s in range(n_states):
            for lane in range(LANES):
                d = x[0, lane] - values[s]
                never = pasts[lane] >= 0 and pasts[lane] != s >> even
                place = s + s // of_odd * pad
                cost[place * LANES + lane] = np.float32(_NEVER) if never else d * d
        for i in range(1, length):
            before, after = cost.ctypes.data, new_cost.ctypes.data
            ways_in, target = came_from[i].ctypes.data, x[i].ctypes.data
            if i & 1:
                for u in range(of_odd):
                    s = u << odd
                    into = after + 4 * LANES * (s + s // of_even * pad)
                    step_odd(before, into, ways_in, values.ctypes.data, target, u, of_odd + pad)
            else:
                for u in range(of_even):
                    s = u << even
                    into = after + 4 * LANES * (s + s // of_odd * pad)
                    step_even(before, into, ways_in, values.ctypes.data, target, u, of_even + pad)
            cost, new_cost = new_cost, cost
        stride = of_odd if length & 1 else of_even
        for lane in range(LANES):
            best, state = np.float32(2 * _NEVER), 0
            for s in range(n_states):
                allowed = pasts[lane] < 0 or pasts[lane] == s & (of_even - 1)
                here = cost[(s + s // stride * pad) * LANES + lane]
                if allowed and here < best:
                    best, state = here, s
            for i in range(length - 1, -1, -1):
                states[lane, i] = state
                if i:
                    bits, n_pasts = (odd, of_odd) if i & 1 else (even, of_even)
                    u = state >> bits
                    way = came_from[i, u * LANES + lane] & ((1 << bits) - 1)
                    state = u | (np.int64(way) * n_pasts)

    return walk


def _step(bits: int) -> Any:
    """Return step(before, into, ways_in, values, x, u, stride), all addresses and integers.

    For past u: the cheapest of the 2^k ways in, `stride` states apart, and from it the costs of
    the 2^k states (u << k) | j, each (x - value)^2 more, written to `into`.
    """
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    i8, i32, i64, f32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
    ints, floats, bytes_ = (ir.VectorType(t, LANES) for t in (i32, f32, i8))
    ways, size = 2**bits, 4 * LANES

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        before, into, ways_in, values, x, u, stride = arguments

        def at(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def times(number: Any, factor: int) -> Any:
            return builder.mul(number, ir.Constant(i64, factor))

        def splat(number: Any) -> Any:
            one = builder.insert_element(
                ir.Constant(floats, ir.Undefined), number, ir.Constant(i32, 0)
            )
            zeros = ir.Constant(ints, [0] * LANES)
            return builder.shuffle_vector(one, ir.Constant(floats, ir.Undefined), zeros)

        mask, offset, least = ir.Constant(ints, [-ways] * LANES), times(u, size), None
        for j in range(ways):
            image = builder.load(at(before, offset, ints), align=size)
            image = builder.and_(image, mask)
            if least is None:
                least = image
            else:
                image = builder.or_(image, ir.Constant(ints, [j] * LANES))
                is_less = builder.icmp_signed("<", image, least)
                least = builder.select(is_less, image, least)
            offset = builder.add(offset, times(stride, size))
        way = builder.trunc(least, bytes_)
        builder.store(way, at(ways_in, times(u, LANES), bytes_), align=LANES)
        so_far = builder.bitcast(builder.and_(least, mask), floats)
        target = builder.load(at(x, ir.Constant(i64, 0), floats), align=4)
        for j in range(ways):
            place = builder.add(times(u, ways), ir.Constant(i64, j))
            value = builder.load(at(values, times(place, 4), f32), align=4)
            d = builder.fsub(target, splat(value))
            cost = builder.fadd(so_far, builder.fmul(d, d))
            builder.store(cost, at(into, ir.Constant(i64, j * size), floats), align=size)
        return context.get_dummy_value()

    def typing(context: Any, before, into, ways_in, values, x, u, stride):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 7), emit

    return intrinsic(typing)


def _workspace(n_states: int, own: tuple[int, int], length: int) -> tuple[np.ndarray, ...]:
    """Return this thread's two rows of costs and its ways, at addresses that vectors ask for."""
    spaces: dict[str, tuple[np.ndarray, ...]] = _of_thread.__dict__
    key = str((n_states, own, length))
    if key not in spaces:
        size = 4 * LANES * (n_states + PAD * 2 ** own[1])
        rows = [_aligned(size).view(np.float32) for _ in range(2)]
        n_pasts = n_states >> own[0]
        ways = _aligned(length * n_pasts * LANES).reshape(length, n_pasts * LANES)
        spaces[key] = (*rows, ways)
    return spaces[key]


def _aligned(n_bytes: int) -> np.ndarray:
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes]
