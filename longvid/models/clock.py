"""Where a transformer of somebody else's pipeline is: which run, which step, which branch of guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class PipelineClock:
    """Told by the transformer's calls: a timestep is a step among the scheduler's.

    A lower step, or steps that were set anew, begin a new run: a run may end at any call, also at its first.
    `branch` counts calls at one step: with guidance there are two, the prompt's first.
    """

    pipeline: Any
    run: int = 0
    step: int = -1
    branch: int = 0
    num_steps: int = 0
    _times: Tensor | None = None

    def tick(self, timestep: Tensor) -> bool:
        """Take a call's timestep. Whether a new run begins."""
        times = self.pipeline.scheduler.timesteps
        step = int((times.to(timestep.device).double() - timestep.max().double()).abs().argmin())
        is_new = step < self.step or times is not self._times
        self.branch = self.branch + 1 if step == self.step and not is_new else 0
        self.run, self.step, self.num_steps, self._times = self.run + is_new, step, len(times), times
        return is_new
