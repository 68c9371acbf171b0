"""A trellis-coded layer as EXL3 stores it: the same walks and scales in other places.

Read in exllamav3 1.4.1. W = diag(svh) H Y^T H diag(suh), H in blocks of 128 over sqrt(128):

trellis  (in / 16, out / 16, 16 * bits) int16, a tile of 16 inputs and 16 outputs each. A walk's
         bits in groups of 32, the first the most significant of a little-endian word: ours with
         each four bytes turned round
suh      (in,) float16: the inputs' signs times column_scales
svh      (out,) float16: the outputs' signs times row_scales
mul1, mcg   0-dimensional int32, their factor: which codebook it is; without either, 3inst

All exact with scales=channels. A level with one scale for all has it as the product of two float16
numbers, one on each side, that comes nearest to it: within 2^-17 of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...methods import compose
from ...methods.base import Shape, State
from ...methods.maths.hashing import signs
from ...methods.trellis import Trellis
from ...plans.level import Level

BLOCK = 128  # of its Hadamard matrices
STATE_BITS = 16
FACTORS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED, "3inst": None}
LEVEL = "trellis:bits={bits},state_bits=16,codebook=mul1,rotation=128,order=mma,scales=channels"


def obstacles(level: Level, shape: Shape) -> Iterator[str]:
    """Yield why EXL3 has no place for a weight of `shape` at `level`; nothing where it has."""
    known = compose.normalize(level)
    parts = list(compose.parts(known))
    part, params, _ = parts[0]
    if len(parts) > 1 or not isinstance(part, Trellis):
        yield f"level '{level}' is not one trellis term"
        return
    wanted = {"state_bits": STATE_BITS, "rotation": str(BLOCK), "order": "mma"}
    wrong = [f"{k}={params[k]} where it has {v}" for k, v in wanted.items() if params[k] != v]
    if params["bits"] % 1:
        wrong.append(f"bits={params['bits']} where it has whole ones")
    if not params["tail_biting"]:
        wrong.append("tail_biting=false where it has true")
    if params["codebook"] not in FACTORS:
        wrong.append(f"codebook={params['codebook']} where it has {', '.join(FACTORS)}")
    if wrong:
        yield f"level '{level}' has {'; '.join(wrong)}"
    if any(n % BLOCK for n in shape):
        yield f"its {shape[0]} x {shape[1]} weights are no multiples of {BLOCK}"


def pack(level: Level, state: State, shape: Shape) -> dict[str, Tensor]:
    """Return EXL3's tensors of a weight, by the last part of their names."""
    for name, like in compose.empty(level, shape, torch.float32).items():
        if state[name].shape != like.shape:
            raise ValueError(
                f"a weight of shape {shape} at '{level}' has {name} of shape "
                f"{tuple(like.shape)}, got {tuple(state[name].shape)}"
            )
    ((_, params, _),) = compose.parts(compose.normalize(level))
    codes, book = state["codes"].cpu(), FACTORS[params["codebook"]]
    words = codes.transpose(0, 1).contiguous().unflatten(-1, (-1, 4)).flip(-1)
    out, columns = (16 * n for n in codes.shape[:2])
    rows, inputs = _scales(state)
    tensors = {
        "trellis": words.flatten(-2).contiguous().view(torch.int16),
        "suh": signs(columns, 2 * params["seed"]).half() * inputs,
        "svh": signs(out, 2 * params["seed"] + 1).half() * rows,
    }
    if book is not None:
        tensors[params["codebook"]] = torch.tensor(book - 2**32, dtype=torch.int32)
    return tensors


def _scales(state: State) -> tuple[Tensor, Tensor]:
    """Return the scales of rows and of columns, float16 and each a vector or one number."""
    if "scale" in state:
        pair = two_halves(float(state["scale"]))
        return torch.tensor(pair[0]).half(), torch.tensor(pair[1]).half()
    return state["row_scales"].cpu(), state["column_scales"].cpu()


def two_halves(x: float) -> tuple[float, float]:
    """Return two float16 numbers whose product comes nearest to x, of about equal size."""
    if x == 0:
        return 0.0, 0.0
    size = torch.tensor(abs(x), dtype=torch.float64)
    power = torch.floor(torch.log2(size) / 2).exp2()
    a = torch.arange(1024, 2048, dtype=torch.float64) / 1024 * power  # every mantissa
    b = (size / a).half().double()
    best = int((a * b - size).abs().argmin())
    return (float(a[best]), float(b[best]) if x > 0 else -float(b[best]))
