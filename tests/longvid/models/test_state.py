"""Solvers and the streaming decoder go on from a saved state to the same bits."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from longvid.checkpoint import read_tensors, write_tensors
from longvid.models.solvers import make_sampler
from longvid.models.wan_vae import WanStreamDecoder
from longvid.sampler import Sampler
from longvid.settings import SamplerSettings


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def through_a_file(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    write_tensors(folder / "state.safetensors", state)
    return dict(read_tensors(folder / "state.safetensors", lambda name: True, torch.device("cpu")))


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_solver_goes_on_from_every_step_to_the_same_bits(tmp_path: Path, solver: str, steps: int) -> None:
    settings = SamplerSettings.model_validate({"solver": solver, "steps": steps})
    sampler = make_sampler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), settings)
    _holds_at_every_cut(sampler, tmp_path)


@pytest.mark.parametrize("config", [{"solver_order": 3}, {"disable_corrector": [0, 2]}, {"solver_order": 1}])
def test_so_does_a_checkpoint_s_own_unipc(tmp_path: Path, config: dict[str, object]) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**flow, **config)
    _holds_at_every_cut(make_sampler(scheduler, SamplerSettings(steps=6)), tmp_path)


def _holds_at_every_cut(sampler: Sampler, folder: Path) -> None:
    velocities = [randn(3, 2, 4, 4, seed=step) for step in range(sampler.num_steps)]
    solver, samples, states = sampler.new_solver(), [randn(3, 2, 4, 4, seed=99)], []
    for step, velocity in enumerate(velocities):
        states.append(solver.state())
        samples.append(solver.step(velocity, step, samples[-1]))
    for cut, state in enumerate(states):  # taken then, looked at now: the solver went on without touching them
        resumed = sampler.new_solver()
        resumed.load_state(through_a_file(state, folder))
        for step in range(cut, sampler.num_steps):
            moved = resumed.step(velocities[step], step, samples[step])
            assert torch.equal(moved, samples[step + 1]), f"cut before step {cut}, then at step {step}"


@pytest.fixture(scope="module")
def vae() -> diffusers.AutoencoderKLWan:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def test_a_decoder_goes_on_from_every_latent_to_the_same_bits(tmp_path: Path, vae: diffusers.AutoencoderKLWan) -> None:
    latents = randn(4, 6, 4, 6, seed=0)
    decoder, states, frames = WanStreamDecoder(vae), [], []
    for i in range(latents.shape[1]):
        states.append(decoder.state())
        frames.append(decoder.push(latents[:, i : i + 1]))
    kept = [[value.stride() for value in state.values()] for state in states]
    for cut, state in enumerate(states):
        loaded = through_a_file(state, tmp_path)
        assert [loaded[name].stride() for name in state] == kept[cut]
        resumed = WanStreamDecoder(vae)
        resumed.push(latents[:, :2])  # another film's state, to be forgotten
        resumed.load_state(loaded)
        assert torch.equal(resumed.push(latents[:, cut:]), torch.cat(frames[cut:]))
