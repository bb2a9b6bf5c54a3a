"""The training forward is the stock model's, with less work."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given
from hypothesis import strategies as st

from longvid.training.dit import DIT_CONFIG, make_dit, window_text, window_velocity
from longvid.training.levels import Span, draw_levels, shift_levels


def test_the_training_forward_equals_the_stock_model_with_padded_text_and_token_timesteps() -> None:
    dit = make_dit(0)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.05)
    stock = WanTransformer3DModel(**DIT_CONFIG).eval()
    stock.load_state_dict(dit.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 3, 8, 8, generator=generator)
    sigma = torch.rand(2, 3, generator=generator)
    states = torch.randn(2, 9, 128, generator=generator)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    index = torch.arange(2)[:, None].repeat(1, 3)
    padded = torch.nn.functional.pad(states * mask[..., None], (0, 0, 0, 512 - 9))
    with torch.no_grad():
        ours = window_velocity(dit, x, sigma, window_text(states, mask, index))
        theirs = stock(x, (sigma * 1000).repeat_interleave(16, dim=1), padded, return_dict=False)[0]
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4


def test_each_latent_of_a_window_attends_its_own_caption() -> None:
    dit = make_dit(0)
    torch.nn.init.normal_(dit.proj_out.weight, std=0.05)
    generator = torch.Generator().manual_seed(2)
    x, sigma = torch.randn(1, 8, 2, 8, 8, generator=generator), torch.full((1, 2), 0.5)
    states, mask = torch.randn(2, 5, 128, generator=generator), torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad():
        velocities = [
            window_velocity(dit, x, sigma, window_text(states, mask, torch.tensor([index])))
            for index in ([0, 0], [0, 1])
        ]
    change = (velocities[0] - velocities[1]).abs().amax((0, 1, 3, 4))
    assert change[1] > 3 * change[0] > 0


def test_at_initialisation_words_outvote_the_padding() -> None:
    dit = make_dit(0)
    words = torch.randn(1, 12, 128)
    embedded = dit.condition_embedder.text_embedder(torch.cat([words[0], torch.zeros(1, 128)]))
    attn = dit.blocks[0].attn2
    with torch.no_grad():
        key = attn.norm_k(attn.to_k(embedded)).view(13, 4, 64)
        query = attn.norm_q(attn.to_q(torch.randn(50, 256))).view(50, 4, 64)
        logits = torch.einsum("qhd,khd->hqk", query, key) / 8
        logits[..., -1] += math.log(500)
    assert logits.softmax(-1)[..., -1].mean() < 0.5


@given(st.integers(0, 2**31), st.booleans())
def test_levels_rise_from_left_context_over_own_latents_to_right_context(seed: int, at_start: bool) -> None:
    span = Span(0, 8, 2) if at_start else Span(2, 6, 2)
    u = draw_levels(np.random.default_rng(seed), 64, span)
    assert u.shape == (64, 10) and u.min() >= 0 and u.max() <= 1
    own = u[:, span.left : span.left + span.own]
    staircase = (own == own[:, :1]).all(1)
    assert staircase.mean() > 0.5
    stairs = u[staircase]
    assert (np.diff(stairs, axis=1) >= 0).all()
    sigma = shift_levels(u, 5.0)
    assert (sigma >= u).all() and sigma.max() <= 1
