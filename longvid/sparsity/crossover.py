"""Where sparse attention begins to pay: by each kernel's measured speed beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass

from longvid.kernels.dispatch import Backend


@dataclass(frozen=True)
class Speed:
    """A kernel beside dense attention: `efficiency` is its speed-up times density, `overhead` what it takes besides,
    as a share of dense attention, and under `min_scores` (queries x keys) no density makes up for starting it."""

    efficiency: float
    overhead: float
    min_scores: int


SPEEDS: dict[Backend, Speed] = {
    "triton": Speed(efficiency=0.8, overhead=0.1, min_scores=2048 * 2048),
    "cpu": Speed(efficiency=1.0, overhead=0.1, min_scores=512 * 512),
    "gather": Speed(efficiency=0.4, overhead=0.1, min_scores=2048 * 2048),
}
"""As `longvid bench attention` and `benchmarks/gpu.py` measure. Constants, so that no two runs decide otherwise."""


def pays(backend: Backend, num_queries: int, num_keys: int, density: float, choosing: float) -> bool:
    """Whether tiles of this density are faster than dense attention, with what choosing them takes as a share of it."""
    speed = SPEEDS[backend]
    cost = density / speed.efficiency + speed.overhead + choosing
    return num_queries * num_keys >= speed.min_scores and cost < 1
