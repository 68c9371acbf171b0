"""The nearest walk through a trellis: Viterbi's algorithm over all 2^L states.

What a walk costs is a sum of (x - value)^2 in float32. Of the 2^k ways into a state all
2^k states with the same past share the cheapest, so that a weight costs 2^L additions and
comparisons, whatever its rate k. To find the minimum and where it came from in one operation,
the k lowest bits of the (positive) costs' integer images are replaced by the number of the way:
2^(k - 23) of a cost is lost, and equal costs go to the lowest number on any device.

`lanes.py` does it on a CPU for eight walks side by side, `triton_viterbi.py` on a GPU, a walk in
each program, this file on any other device for as many as memory allows; all add the same numbers
in the same order and find the same walks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...base.triton_errors import failures
from . import viterbi_gpu
from .lanes import nearest_walks as nearest_walks_cpu
from .walks import own_bits

MAX_BYTES = 2**29  # what the ways of one batch of walks may take
FREE = -1  # a walk may start and end anywhere
TAIL = 64  # weights on both sides of a walk's ends by which a tail-biting state is chosen


def encode(x: Tensor, values: Tensor, bits: float, *, tail_biting: bool) -> Tensor:
    """Return the states (n, 256) int32 whose values come nearest to x (n, 256) float32.

    values (2^L,) float32: what each state stands for, L >= bits. A tail-biting walk ends in the
    state that its beginning takes for its past. That state is the middle one of the free walk
    through the last and first weights of x (QTIP, section 3.1, over fewer weights).
    """
    if not tail_biting:
        return nearest_walks(x, values, bits)
    state_bits = values.numel().bit_length() - 1
    around = nearest_walks(torch.cat([x[:, -TAIL:], x[:, :TAIL]], 1), values, bits)
    past = around[:, TAIL - 1] & (2 ** (state_bits - int(bits)) - 1)
    return nearest_walks(x, values, bits, past)


def nearest_walks(x: Tensor, values: Tensor, bits: float, past: Tensor | None = None) -> Tensor:
    """Return the states (n, length) int32 of the cheapest walks along x (n, length) float32.

    past (n,) int32: the L - k bits that a walk starts from and ends in; None leaves it free. At
    half bits k is that of even weights, and `length` even.
    """
    if x.device.type == "cpu":
        return nearest_walks_cpu(x, values, bits, past)
    if len(x) and viterbi_gpu.serves(viterbi_gpu.kind_of(x, values, bits, past)):
        found = _by_triton(x, values, bits, past)
        if found is not None:
            return found
    return nearest_walks_torch(x, values, bits, past)


def _by_triton(x: Tensor, values: Tensor, bits: float, past: Tensor | None) -> Tensor | None:
    """Return the walks, None where Triton or the card does not find them."""
    batch = max(1, MAX_BYTES // (x.shape[1] * (values.numel() >> int(bits))))
    kind = viterbi_gpu.kind_of(x, values, bits, past)
    try:
        found = viterbi_gpu.nearest_walks_triton(x, values, bits, past, batch=batch)
        if not viterbi_gpu.has_checked(kind):
            n = viterbi_gpu.CHECKED
            own = None if past is None else past[:n]
            wanted = nearest_walks_torch(x[:n], values, bits, own)
            if not viterbi_gpu.is_right(kind, x[:n], found[:n], wanted):
                raise RuntimeError("walks are not the nearest")
    except torch.OutOfMemoryError:
        raise
    except failures() as error:
        viterbi_gpu.give_up(kind, error)
        return None
    return found


def nearest_walks_torch(
    x: Tensor, values: Tensor, bits: float, past: Tensor | None = None
) -> Tensor:
    """Return what `nearest_walks` does, by tensor operations on any device."""
    pasts = values.numel() >> int(bits)
    batch = max(1, MAX_BYTES // (x.shape[1] * pasts + 16 * values.numel()))
    parts = [
        _batch(part, values, bits, None if past is None else past[i * batch : (i + 1) * batch])
        for i, part in enumerate(x.split(batch))
        if len(part)
    ]
    return torch.cat(parts) if parts else x.new_empty(x.shape, dtype=torch.int32)


def _batch(x: Tensor, values: Tensor, bits: float, past: Tensor | None) -> Tensor:
    n, length = x.shape
    own, n_states = own_bits(bits), values.numel()
    ways, pasts = 2 ** own[0], n_states >> own[0]  # of even weights, the first among them
    cost = (x[:, :1] - values).square()  # (n, 2^L)
    every_past = torch.arange(pasts, device=x.device)
    if past is not None:
        other = every_past.unsqueeze(0) != past.unsqueeze(1)  # (n, pasts)
        cost.view(n, pasts, ways).masked_fill_(other.unsqueeze(2), viterbi_gpu.NEVER)
    came_from = torch.empty(length, n, pasts, dtype=torch.uint8, device=x.device)
    for i in range(1, length):
        into = 2 ** own[i % 2]
        number = torch.arange(into, dtype=torch.int32, device=x.device).view(1, into, 1)
        image = cost.view(torch.int32).view(n, into, n_states // into)
        least = ((image & -into) | number).amin(1)  # (n, pasts)
        came_from[i, :, : n_states // into] = least & (into - 1)
        so_far = (least & -into).view(torch.float32).unsqueeze(2)  # (n, pasts, 1)
        step = (x[:, i : i + 1] - values).square().view(n, n_states // into, into)
        cost = (so_far + step).view(n, n_states)
    if past is not None:  # the last L - k bits of the end are the past
        ends = cost.view(n, ways, pasts)
        ends.masked_fill_(other.unsqueeze(1), 2 * viterbi_gpu.NEVER)
    # the first of equals, as the loop of lanes.py takes it
    state = (cost == cost.amin(1, keepdim=True)).to(torch.uint8).argmax(1)
    states = torch.empty(n, length, dtype=torch.int32, device=x.device)
    everyone = torch.arange(n, device=x.device)
    for i in range(length - 1, -1, -1):
        states[:, i] = state
        if i:
            before = state >> own[i % 2]
            way = came_from[i, everyone, before].long()
            state = before | way * (n_states >> own[i % 2])
    return states
