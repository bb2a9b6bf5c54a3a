"""Solvers hold to their equations in fp32 and to diffusers where it has the same one."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from longvid.sampler import EulerSampler, guide


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 30), st.floats(1.0, 8.0))
def test_euler_equals_diffusers_to_the_last_bit(steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = EulerSampler(tuple(theirs.sigmas.tolist()))
    solver, sample = ours.new_solver(), randn(2, 3)
    expected = sample
    assert ours.num_steps == steps
    for step, timestep in enumerate(theirs.timesteps):
        velocity = randn(2, 3, seed=step + 1)
        expected = theirs.step(velocity, timestep, expected).prev_sample
        sample = solver.step(velocity, step, sample)
        assert torch.equal(sample, expected)
        assert torch.tensor(ours.timestep(step), dtype=torch.float32) == timestep


def test_euler_follows_a_constant_velocity_to_the_end():
    sampler, noise, data = EulerSampler((1.0, 0.75, 0.5, 0.0)), randn(4), randn(4, seed=1)
    sample = noise
    for step in range(sampler.num_steps):
        sample = sampler.new_solver().step(noise - data, step, sample)
    assert torch.allclose(sample, data, atol=1e-6)


def test_the_solver_works_in_fp32_and_leaves_its_sample_alone():
    sample, velocity = randn(4), randn(4, seed=1).bfloat16()
    before = sample.clone()
    after = EulerSampler((1.0, 0.0)).new_solver().step(velocity, 0, sample)
    assert after.dtype == torch.float32
    assert torch.equal(after, before - velocity.float())
    assert torch.equal(sample, before)


def test_finished_latents_are_at_timestep_zero():
    sampler = EulerSampler((0.9, 0.5, 0.0))
    assert [sampler.timestep(step) for step in range(3)] == [900.0, 500.0, 0.0]


@pytest.mark.parametrize(
    "sigmas", [(), (0.0,), (1.0,), (1.0, 0.5), (0.5, 1.0, 0.0), (1.0, 1.0, 0.0), (float("nan"), 0)]
)
def test_sigmas_that_do_not_fall_to_zero_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must decrease"):
        EulerSampler(sigmas)


def test_guidance_is_computed_in_fp32():
    cond, uncond = randn(100), randn(100, seed=1)
    assert torch.equal(guide(cond, uncond, 5.0), uncond + 5.0 * (cond - uncond))
    half = guide(cond.bfloat16(), uncond.bfloat16(), 5.0)
    assert torch.equal(half, guide(cond.bfloat16().float(), uncond.bfloat16().float(), 5.0))
    assert half.dtype == torch.float32


def test_guidance_of_scale_zero_is_the_unconditional_velocity():
    cond, uncond = randn(100), randn(100, seed=1)
    assert torch.equal(guide(cond, uncond, 0.0), uncond)
