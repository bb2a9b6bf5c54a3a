"""Inputs that are like a film's, and one attention by a policy."""

from __future__ import annotations

import pytest
import torch

from longvid.kernels.dense import attend_lse
from longvid.kernels.dispatch import sparse_attention
from longvid.sparsity.policy import Call, Heads

DIM = 16


@pytest.fixture
def film():
    """A function: q, k and v of smooth video. Near places are alike, each head at a scale of its own; text beside."""
    return _film


def _film(tokens, seed=0, batch=1, heads=4, noise=0.3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    spans = (torch.arange(n) for n in (len(tokens.keys), tokens.height, tokens.width))
    places = torch.cartesian_prod(*spans).float()
    waves = draw(heads, 3, DIM // 2) * torch.linspace(0.1, 0.8, heads)[:, None, None]
    phases = places @ waves + draw(heads, 1, DIM // 2)
    smooth = torch.cat([phases.cos(), phases.sin()], -1).transpose(0, 1)
    latents = 2 * smooth + noise * draw(batch, *smooth.shape)
    before, behind = draw(batch, tokens.text_before, heads, DIM), draw(batch, tokens.text_behind, heads, DIM)
    k = torch.cat([before, latents, behind], 1)
    v = torch.cat([before, smooth.roll(3, -1) + noise * draw(batch, *smooth.shape), behind], 1)
    first = (tokens.queries.start - tokens.keys.start) * tokens.per_latent
    of_queries = latents[:, first : first + len(tokens.queries) * tokens.per_latent]
    q = torch.cat([before, of_queries + noise * draw(*of_queries.shape), behind], 1)
    return q, k, v


@pytest.fixture
def attend_by():
    """A function: one attention by a policy, in the last of four layers; the output and the layout."""
    return _attend_by


def _attend_by(policy, inputs, step, tokens, memory, *, heads=None, layer=3, num_steps=10):
    num_heads = inputs[0].shape[2]
    call = Call(layer, 4, step, num_steps, tokens, heads or Heads.all(num_heads), memory)
    layout = policy.layout(*inputs, call)
    partial = attend_lse(*inputs) if layout is None else sparse_attention(*inputs, layout)
    return policy.finish(*inputs, partial, layout, call), layout


@pytest.fixture
def run(attend_by):
    """A function: the outputs and the layouts of one layer over as many steps as there are inputs."""

    def run(policy, tokens, films, heads=None):
        memory = {}
        results = [attend_by(policy, inputs, i, tokens, memory, heads=heads) for i, inputs in enumerate(films)]
        return [out for out, _ in results], [layout for _, layout in results]

    return run


@pytest.fixture
def _small_clusters(monkeypatch):
    """Of a few hundred tokens, clusters as there would be of many."""
    monkeypatch.setattr("longvid.sparsity.svg2.QUERIES_A_CLUSTER", 16)
    monkeypatch.setattr("longvid.sparsity.svg2.KEYS_A_CLUSTER", 8)
