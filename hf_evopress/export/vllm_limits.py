"""What vLLM will refuse of a compressed-tensors checkpoint, said when it is written.

Read in vLLM 0.32, and tried in its build for CPUs: a layer that computes several of the
checkpoint's at once takes one level for them; kernels are for 4 and 8 bits, on CPUs for 4.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..methods import compose
from ..plans.level import DENSE, Level
from ..plans.plan import Plan

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ON_GPUS, ON_CPUS = (4, 8), (4,)
CPU_MULTIPLE = 32  # of rows and columns


def vllm_obstacles(plan: Plan) -> list[str]:
    """Return what vLLM does not take of a plan of levels with codes, one sentence each."""
    said = []
    if wrong := _unlike(plan.levels):
        said.append(
            f"vLLM computes {wrong[0]} as one layer, and they have several levels ({len(wrong)} "
            "such layers): --tie q_proj,k_proj,v_proj --tie gate_proj,up_proj gives them one"
        )
    bits = {unit: _bits(level) for unit, level in plan.items() if not level.is_dense}
    if found := sorted({b for b in bits.values() if b not in ON_GPUS}):
        said.append(f"vLLM has no kernels for {_some(found)} bits: it takes 4 and 8")
    elif any(b not in ON_CPUS for b in bits.values()):
        n = sum(b not in ON_CPUS for b in bits.values())
        said.append(f"vLLM on a CPU takes 4 bits only, and {n} layers are at 8; on a GPU both")
    odd = [u for u in bits if any(n % CPU_MULTIPLE for n in plan.shapes.get(u, ()))]
    if odd:
        said.append(
            f"vLLM on a CPU takes weights of multiples of {CPU_MULTIPLE} rows and columns: "
            f"{odd[0]} is {' x '.join(map(str, plan.shapes[odd[0]]))}"
        )
    return said


def _unlike(levels: Mapping[str, Level]) -> list[str]:
    """Return the layers of one fused layer whose levels differ, as text, for each such layer."""
    found = []
    parents = dict.fromkeys(unit.rpartition(".")[0] for unit in levels)
    for parent in parents:
        for names in FUSED:
            units = [f"{parent}.{name}" for name in names]
            if not any(unit in levels for unit in units):
                continue
            if len({levels.get(unit, DENSE) for unit in units}) > 1:
                found.append(f"{parent}.{'/'.join(names)}")
    return found


def _bits(level: Level) -> int:
    term = compose.normalize(level).terms[0]
    return int(compose.method(term.method).filled(term.kwargs)["bits"])


def _some(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
