"""Samplers and solvers: the noise level of every step, and how a predicted velocity moves the latents. All in fp32.

A Sampler is shared by all chunks; a Solver belongs to one chunk, for it may keep a history of that chunk's velocities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Solver(Protocol):
    """Moves the latents of one chunk; called once for every step, in order."""

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        """New latents after `step`, fp32 and in new memory: the sample may still be somebody's left context."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Its history so far. The tensors are never written to, so they may be saved while it goes on."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on, to the last bit, where a fresh solver of the same sampler was when it gave this state."""
        ...


@runtime_checkable
class Forecaster(Solver, Protocol):
    """A solver that can do without the velocity of some steps."""

    def forecast(self, step: int) -> Tensor:
        """The velocity of a step by those before, fp32; to be given to `step` next."""
        ...

    def learn_negative(self, velocity: Tensor, step: int, sample: Tensor) -> None:
        """Take the velocity of the negative's pass at a step."""
        ...

    def negative(self, step: int, sample: Tensor) -> Tensor:
        """The velocity of a negative's pass that was left out, fp32, by the last one that was made."""
        ...


class Sampler(Protocol):
    """The noise levels of a render, and a fresh solver for every chunk."""

    @property
    def num_steps(self) -> int: ...

    def timestep(self, step: int) -> float:
        """What the model is given for latents that have taken `step` steps, 0..num_steps; 0.0 at num_steps."""
        ...

    def new_solver(self) -> Solver: ...


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in fp32: uncond + scale * (cond - uncond), for velocities of equal shape."""
    cond, uncond = cond.float(), uncond.float()
    return uncond + scale * (cond - uncond)


def fuse(velocity: Tensor, overlap: Tensor) -> Tensor:
    """Velocity [B, C, F, h, w] with its last latents fused with what the chunk after predicts for them, in fp32.

    `overlap` [B, C, f, h, w] is of the last f; its weights are 1/(f + 1), 2/(f + 1), ... f/(f + 1).
    """
    count = overlap.shape[2]
    weights = torch.arange(1, count + 1, device=velocity.device).view(-1, 1, 1) / (count + 1)
    fused = velocity.float().clone()
    fused[:, :, -count:] += weights * (overlap.float().to(velocity.device) - fused[:, :, -count:])
    return fused


@dataclass(frozen=True)
class EulerSampler:
    """The Euler method for flow matching: x + (sigma_next - sigma) * v.

    `sigmas` are the noise levels, one more than there are steps, decreasing to 0 (a ValueError otherwise).
    Given those of diffusers' FlowMatchEulerDiscreteScheduler, this equals it to the last bit.
    """

    sigmas: tuple[float, ...]
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        falls = all(a > b for a, b in pairwise(self.sigmas))
        if len(self.sigmas) < 2 or not falls or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas must decrease to 0 in one step or more, not {self.sigmas}")

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def timestep(self, step: int) -> float:
        return self.sigmas[step] * self.num_train_timesteps

    def new_solver(self) -> EulerSampler:
        """Itself: Euler keeps no history."""
        return self

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        return sample.float() + (self.sigmas[step + 1] - self.sigmas[step]) * velocity.float()

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert not state, "Euler keeps no history"
