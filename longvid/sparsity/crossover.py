"""Where sparse attention begins to pay: by each kernel's measured speed beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longvid.kernels import native
from longvid.kernels.dispatch import Backend


@dataclass(frozen=True)
class Speed:
    """A kernel beside dense attention: `efficiency` is its speed-up times density; besides it takes `overhead`, a share
    of dense attention, and for every query and key as long as `token_scores` scores of that; and under `min_scores`
    (queries x keys) no density makes up for starting it. `dense` is how many times as fast as torch's on vectors that
    dense attention is."""

    efficiency: float
    overhead: float
    min_scores: int
    token_scores: float = 0.0
    dense: float = 1.0


SPEEDS: dict[Backend | Literal["amx"], Speed] = {
    "triton": Speed(efficiency=0.8, overhead=0.1, min_scores=2048 * 2048),
    "cpu": Speed(efficiency=1.0, overhead=0.1, min_scores=512 * 512),
    "amx": Speed(efficiency=0.8, overhead=0.0, min_scores=1024 * 1024, token_scores=150, dense=2.0),
    "gather": Speed(efficiency=0.4, overhead=0.1, min_scores=2048 * 2048),
}
"""As `longvid bench attention` and `benchmarks/gpu.py` measure. Constants, so that no two runs decide otherwise.

`amx` is the CPU's backend with matrix units, which serve dense attention, too."""


def pays(backend: Backend, num_queries: int, num_keys: int, density: float, choosing: float) -> bool:
    """Whether tiles of this density are faster than dense attention, with what choosing them takes as a share of it.

    `choosing` is a share of torch's dense attention on a CPU.
    """
    speed = SPEEDS["amx" if backend == "cpu" and native.isa() == "amx" else backend]
    num_scores = num_queries * num_keys
    per_token = speed.token_scores * (num_queries + num_keys) / max(1, num_scores)
    cost = density / speed.efficiency + speed.overhead + per_token + choosing * speed.dense
    return num_scores >= speed.min_scores and cost < 1
