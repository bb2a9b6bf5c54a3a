"""CogVideoX's schedulers as solvers: v-prediction, by DDIM (2B) or by an SDE form of DPM-Solver++ (5B, 1.5)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from longvid.errors import InputError
from longvid.models.cogvideox import unpack
from longvid.settings import SamplerSettings


class CogVideoXSampler:
    """The noise levels of a checkpoint's scheduler, and its steps in fp32.

    `together` is how many of the VAE's latents are one of the engine's. A model's output is v, in the place of a
    velocity. Raises InputError for settings that the scheduler has not.
    """

    def __init__(self, scheduler: object, settings: SamplerSettings, together: int) -> None:
        if not isinstance(scheduler, CogVideoXDDIMScheduler | CogVideoXDPMScheduler):
            raise InputError(f"model: its scheduler {type(scheduler).__name__} is not one of CogVideoX")
        if settings.solver != "auto":
            raise InputError(f"sampler.solver must be auto, not {settings.solver}: CogVideoX has its own scheduler")
        if settings.shift is not None:
            raise InputError("sampler.shift is of flow-matching models, which CogVideoX is not")
        self._scheduler, self._together = copy.deepcopy(scheduler), together
        self._scheduler.set_timesteps(settings.steps)
        self._timesteps = [int(t) for t in self._scheduler.timesteps]

    @property
    def num_steps(self) -> int:
        return len(self._timesteps)

    def timestep(self, step: int) -> float:
        return float(self._timesteps[step]) if step < self.num_steps else 0.0

    def new_solver(self) -> DdimSolver | DpmSolver:
        if isinstance(self._scheduler, CogVideoXDDIMScheduler):
            return DdimSolver(self._scheduler, self._timesteps)
        return DpmSolver(self._scheduler, self._timesteps, self._together)


class DdimSolver:
    """The stock DDIM. It keeps no history."""

    def __init__(self, scheduler: CogVideoXDDIMScheduler, timesteps: list[int]) -> None:
        self._scheduler, self._timesteps = scheduler, timesteps

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        moved: Tensor = self._scheduler.step(
            velocity.float(), self._timesteps[step], sample.float(), return_dict=False
        )[0]
        return moved

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        assert not state, "DDIM keeps no history"


class DpmSolver:
    """The stock DPM for one chunk: its last prediction, and the generator of the noise that every step adds.

    The generator is seeded by the chunk's first noise (`noise_seed_of`), so it needs to know neither chunk nor seed.
    """

    def __init__(self, scheduler: CogVideoXDPMScheduler, timesteps: list[int], together: int) -> None:
        self._scheduler, self._timesteps, self._together = scheduler, timesteps, together
        self._generator = torch.Generator("cpu")
        self._previous: Tensor | None = None

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        if step == 0:
            self._generator.manual_seed(noise_seed_of(sample))
        # In the layout of the stock pipeline, so that noise falls on the same latents.
        v, x = (unpack(tensor.float(), self._together)[None] for tensor in (velocity, sample))
        moved, self._previous = self._scheduler.step(
            v,
            self._previous,
            self._timesteps[step],
            self._timesteps[step - 1] if step else None,
            x,
            generator=self._generator,
            return_dict=False,
        )
        latents: Tensor = moved[0]
        return pack(latents, self._together)

    def state(self) -> dict[str, Tensor]:
        if self._previous is None:
            return {}
        return {"previous": self._previous, "generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self._previous = state["previous"]
            self._generator.set_state(state["generator"].cpu())


def noise_seed_of(sample: Tensor) -> int:
    """A 63-bit seed from a chunk's first noise."""
    content = sample.detach().float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def pack(latents: Tensor, together: int) -> Tensor:
    """The VAE's latents [F·T, C, h, w] as the engine's [T·C, F, h, w]; undoes `unpack`."""
    cells: Tensor = latents.unflatten(0, (-1, together))
    return cells.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()
