"""Where sparse attention begins to pay: by each kernel's measured speed beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longvid.kernels import native
from longvid.kernels.dispatch import Backend


@dataclass(frozen=True)
class Speed:
    """A kernel beside dense attention: `efficiency` is its speed-up times density, `overhead` what a policy adds as a
    share of dense attention, and under `min_scores` (queries x keys) no density makes up for starting it."""

    efficiency: float
    overhead: float
    min_scores: int


SPEEDS: dict[Backend | Literal["amx"], Speed] = {
    "triton": Speed(efficiency=0.8, overhead=0.1, min_scores=2048 * 2048),
    "cpu": Speed(efficiency=1.0, overhead=0.1, min_scores=512 * 512),
    "amx": Speed(efficiency=0.8, overhead=0.3, min_scores=1024 * 1024),
    "gather": Speed(efficiency=0.4, overhead=0.1, min_scores=2048 * 2048),
}
"""As `longvid bench attention` and `benchmarks/gpu.py` measure. Constants, so that no two runs decide otherwise.

`amx` is the CPU's backend with matrix units: they serve dense attention too, so what a policy adds is more of it."""


def pays(backend: Backend, num_queries: int, num_keys: int, density: float) -> bool:
    """Whether tiles of this density are faster than dense attention."""
    speed = SPEEDS["amx" if backend == "cpu" and native.isa() == "amx" else backend]
    return num_queries * num_keys >= speed.min_scores and density / speed.efficiency + speed.overhead < 1
