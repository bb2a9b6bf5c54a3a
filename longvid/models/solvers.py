"""From a checkpoint's scheduler to the engine's sampler: our Euler, or the stock UniPC."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from longvid.errors import InputError
from longvid.sampler import EulerSampler, Sampler
from longvid.settings import SamplerSettings


class UniPcSolver:
    """One chunk's UniPC: the stock scheduler with a history of its own, in fp32."""

    def __init__(self, scheduler: UniPCMultistepScheduler) -> None:
        self._scheduler = copy.deepcopy(scheduler)

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        timestep = self._scheduler.timesteps[step]
        moved: Tensor = self._scheduler.step(velocity.float(), timestep, sample, return_dict=False)[0]
        return moved

    def state(self) -> dict[str, Tensor]:
        scheduler = self._scheduler
        begun = scheduler.step_index is not None  # before the first step, the last order is not set
        counters = (scheduler.step_index, scheduler.lower_order_nums, scheduler.this_order) if begun else ()
        state = {"counters": torch.tensor(counters, dtype=torch.int64)}
        for i, (output, timestep) in enumerate(zip(scheduler.model_outputs, scheduler.timestep_list, strict=True)):
            if output is not None:
                state |= {f"output_{i}": output, f"timestep_{i}": timestep}
        if scheduler.last_sample is not None:
            state["last_sample"] = scheduler.last_sample
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        scheduler, order = self._scheduler, self._scheduler.config.solver_order
        if len(state["counters"]):
            scheduler._step_index, scheduler.lower_order_nums, scheduler.this_order = state["counters"].tolist()
        scheduler.model_outputs = [state.get(f"output_{i}") for i in range(order)]
        timesteps = [state.get(f"timestep_{i}") for i in range(order)]
        scheduler.timestep_list = [None if t is None else t.to(scheduler.timesteps.device) for t in timesteps]
        scheduler.last_sample = state.get("last_sample")


class UniPcSampler:
    """Flow-matching UniPC of order 2 (Zhao et al., 2023); one solver state a chunk."""

    def __init__(self, scheduler: UniPCMultistepScheduler, num_steps: int) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_timesteps(num_steps)
        self._scheduler.set_begin_index(0)
        self._timesteps = [*(float(t) for t in self._scheduler.timesteps), 0.0]

    @property
    def num_steps(self) -> int:
        return len(self._timesteps) - 1

    def timestep(self, step: int) -> float:
        return self._timesteps[step]

    def new_solver(self) -> UniPcSolver:
        return UniPcSolver(self._scheduler)


def make_sampler(scheduler: Any, settings: SamplerSettings) -> Sampler:
    """The sampler that the settings ask for, on the noise levels of the checkpoint's scheduler.

    Raises InputError when the checkpoint's scheduler is not a flow-matching one.
    """
    solver = settings.solver
    if solver == "auto":
        solver = "unipc" if isinstance(scheduler, UniPCMultistepScheduler) else "euler"
    config = dict(scheduler.config)
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas")
    if not is_flow:
        raise InputError(f"model: its scheduler {type(scheduler).__name__} is not a flow-matching one")
    own_shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    shift = own_shift if settings.shift is None else settings.shift
    if solver == "unipc":
        kept = config if isinstance(scheduler, UniPCMultistepScheduler) else {}
        return UniPcSampler(_unipc(kept, shift), settings.steps)
    euler = FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=config["num_train_timesteps"])
    euler.set_timesteps(settings.steps)
    return EulerSampler(tuple(float(sigma) for sigma in euler.sigmas), config["num_train_timesteps"])


def _unipc(config: dict[str, Any], shift: float) -> UniPCMultistepScheduler:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return UniPCMultistepScheduler.from_config({**config, **flow})
