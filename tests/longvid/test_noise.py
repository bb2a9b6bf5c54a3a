"""Noise depends on its key and index alone, and is normal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.noise import chunk_noise, noise_seed
from longvid.plan import Chunk, PromptBlend


def chunk_of(noise, noise_key=(7, 0), num_left=0):
    prompts = (PromptBlend(0, 0, 0.0),) * (num_left + len(noise))
    return Chunk(
        index=0,
        shot=0,
        start=0,
        num_latents=len(noise),
        num_left=num_left,
        num_right=0,
        prompts=prompts,
        noise=noise,
        noise_key=noise_key,
    )


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)))
def test_each_latent_can_be_drawn_alone(indices, key):
    together = chunk_noise(chunk_of(tuple(indices), key), 2, 3, 4)
    assert together.shape == (2, len(indices), 3, 4)
    assert together.dtype == torch.float32
    for latent, index in enumerate(indices):
        assert torch.equal(together[:, latent], chunk_noise(chunk_of((index,), key), 2, 3, 4)[:, 0])


def test_noise_covers_own_latents_only():
    assert chunk_noise(chunk_of((0, 1, 2), num_left=2), 4, 2, 2).shape == (4, 3, 2, 2)


def test_other_keys_and_indices_give_other_noise():
    draws = [chunk_noise(chunk_of((index,), key), 1, 4, 4) for index in (0, 1) for key in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    chunk_noise(chunk_of((0,)), 1, 4, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal():
    noise = chunk_noise(chunk_of(tuple(range(16))), 8, 32, 32)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    latents = noise.permute(1, 0, 2, 3).flatten(1)
    correlation = latents @ latents.T / latents.shape[1] - torch.eye(16)
    assert correlation.abs().max() < 0.06


@pytest.mark.parametrize(("key", "seed"), [((0, 0, 0), 7794394879706380688), ((7, 3, 5), 2240274809868603283)])
def test_seeds_never_change(key, seed):
    assert noise_seed(key) == seed
    assert 0 <= seed < 2**63
