"""The executor: carries out a schedule on one stage. It does no schedule arithmetic and knows no model.

What lives is what the actions made and have not dropped yet, so memory is bounded by the chunks in flight and not by
the film. Latents are never written in place: another chunk may still read that version as its left context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

import torch
from torch import Tensor

from longvid.errors import RuntimeFailure
from longvid.parallel.schedule import (
    Action,
    Admit,
    DropKv,
    DropLatents,
    Finish,
    Forward,
    KvVersion,
    LatentVersion,
    Step,
)
from longvid.plan import Chunk, ModelFacts, Plan
from longvid.sampler import Sampler, Solver

KvSpan = object
"""K/V of all layers of a stage for a span of latents: only the stage that made it looks inside."""


@dataclass(frozen=True)
class Unit:
    """One pass of a chunk through all layers. Legend: C channels, F = num_left + num_latents, h and w of a latent.

    `latents` fp32 [C, F, h, w], left context first, to be read only; `timesteps` fp32 [F], one for each latent;
    `right` is the right neighbour's K/V or None; `store_kv` says of which latents (as indices into F) the
    prediction must return K/V.
    """

    chunk: Chunk
    step: int
    latents: Tensor
    timesteps: Tensor
    right: KvSpan | None
    store_kv: slice | None


@dataclass(frozen=True)
class Prediction:
    """`velocity` fp32 [C, num_latents, h, w] of the own latents, guidance applied; `kv` where the unit asked for it."""

    velocity: Tensor
    kv: KvSpan | None = None


@dataclass(frozen=True)
class Finished:
    """A chunk's finished latents fp32 [C, num_latents, h, w], the receiver's to keep."""

    chunk: Chunk
    latents: Tensor


class Stage(Protocol):
    """The layers of a model, on one rank."""

    def forward(self, unit: Unit) -> Prediction: ...


@dataclass
class _Live:
    """All state of a run. Between rounds only latents and solvers are left in it."""

    latents: dict[LatentVersion, Tensor] = field(default_factory=dict)
    kv: dict[KvVersion, KvSpan] = field(default_factory=dict)
    velocity: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    solvers: dict[int, Solver] = field(default_factory=dict)


@dataclass(frozen=True)
class Executor:
    """Runs schedules. `noise` gives a chunk's first latents, fp32 [C, num_latents, h, w], on the stage's device.

    Where the model takes one timestep a chunk (`facts.per_token_timesteps` False), left context is given the chunk's.
    """

    stage: Stage
    sampler: Sampler
    noise: Callable[[Chunk], Tensor]
    facts: ModelFacts

    def run(
        self, actions: Iterable[Action], plan: Plan, on_unit: Callable[[Step], None] | None = None
    ) -> Iterator[Finished]:
        """Yields each chunk as it finishes, in the order of the film; calls `on_unit` after every unit's step.

        Raises RuntimeFailure when latents stop being finite. Closing the iterator early releases everything.
        """
        live = _Live()
        for action in actions:
            match action:
                case Admit(chunk=i):
                    live.latents[LatentVersion(i, 0)] = self.noise(plan.chunks[i])
                    live.solvers[i] = self.sampler.new_solver()
                case Forward():
                    self._forward(action, plan, live)
                case Step():
                    self._step(action, plan, live)
                    if on_unit:
                        on_unit(action)
                case Finish(latents=version):
                    del live.solvers[version.chunk]
                    yield Finished(plan.chunks[version.chunk], live.latents[version].clone())
                case DropLatents(latents=version):
                    del live.latents[version]
                case DropKv(kv=kv):
                    del live.kv[kv]
                case _:
                    assert_never(action)

    @torch.no_grad()
    def _forward(self, action: Forward, plan: Plan, live: _Live) -> None:
        prediction = self.stage.forward(self._unit(action, plan.chunks, live))
        own = live.latents[LatentVersion(action.chunk, action.step)]
        assert prediction.velocity.shape == own.shape, f"{action}: velocity {prediction.velocity.shape} of {own.shape}"
        live.velocity[action.chunk, action.step] = prediction.velocity
        if action.store:
            assert prediction.kv is not None, f"{action}: the stage kept no K/V"
            live.kv[action.store] = prediction.kv

    def _unit(self, action: Forward, chunks: Sequence[Chunk], live: _Live) -> Unit:
        """Own latents behind the last latents of the left context, each at its own noise level."""
        i, k, chunk = action.chunk, action.step, chunks[action.chunk]
        latents, levels = live.latents[LatentVersion(i, k)], [k] * chunk.num_latents
        if action.left:
            latents = torch.cat([live.latents[action.left][:, -chunk.num_left :], latents], dim=1)
            levels = [action.left.version if self.facts.per_token_timesteps else k] * chunk.num_left + levels
        times = [self.sampler.timestep(level) for level in levels]
        timesteps = torch.tensor(times, dtype=torch.float32, device=latents.device)
        right = live.kv[action.right] if action.right else None
        store = slice(chunk.num_left, chunk.num_left + chunks[i - 1].num_right) if action.store else None
        return Unit(chunk, k, latents, timesteps, right, store)

    @torch.no_grad()
    def _step(self, action: Step, plan: Plan, live: _Live) -> None:
        i, k = action.chunk, action.step
        sample, velocity = live.latents[LatentVersion(i, k)], live.velocity.pop((i, k))
        latents = live.solvers[i].step(velocity, k, sample)
        assert latents.data_ptr() != sample.data_ptr(), "a solver must leave its sample as it is"
        if not torch.isfinite(latents).all():
            raise RuntimeFailure(
                f"latents of chunk {i} are not finite after step {k + 1} of {self.sampler.num_steps} "
                f"({self._place(plan.chunks[i], plan)})"
            )
        live.latents[LatentVersion(i, k + 1)] = latents

    def _place(self, chunk: Chunk, plan: Plan) -> str:
        shot = plan.shots[chunk.shot]
        first = self.facts.grid.num_frames(chunk.start)
        end = min(self.facts.grid.num_frames(chunk.start + chunk.num_latents), shot.num_frames)
        return f"shot {shot.index}, frames {shot.first_frame + first}-{shot.first_frame + end - 1}"
