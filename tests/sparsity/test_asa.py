"""Adaptive sparse attention scores tiles along the curve by samples, and keeps what holds the mass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels.dense import attend
from longvid.kernels.layout import Blocks, even_blocks
from longvid.sparsity.asa import AsaPolicy, sampled_scores, sampled_tokens
from longvid.sparsity.settings import Asa
from longvid.sparsity.tiles import tiling
from longvid.sparsity.tokens import TokenMap

FILM = TokenMap(range(6), range(6), range(6), 10, 12)
JOINT = TokenMap(range(2, 8), range(2, 8), range(3, 7), 7, 9, text_before=5, text_behind=11)
CPU = torch.device("cpu")


def make(**changes):
    return AsaPolicy(Asa(policy="asa", **{"tile": 16, "sample": 4, **changes}))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6), sample=st.integers(1, 8))
def test_samples_are_evenly_spread_over_each_block(lengths, sample):
    offsets = torch.tensor([[0, *lengths]]).cumsum(-1).int()
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(0)).int()
    blocks = Blocks(offsets, order[None])
    places = order.argsort()[sampled_tokens(blocks, sample)].view(-1, sample)
    for n, length in enumerate(lengths):
        steps = (places[n] - offsets[0, n]).tolist()
        assert min(steps) >= 0 and max(steps) < length and steps == sorted(steps)
        assert len(set(steps)) == min(sample, length)


def test_scores_are_the_highest_between_samples(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, 8, generator=generator) for n in (50, 70))
    q_blocks, k_blocks = even_blocks(50, 16), even_blocks(70, 16)
    found = sampled_scores(q, k, q_blocks, k_blocks, 4)
    rows, cols = sampled_tokens(q_blocks, 4).view(-1, 4), sampled_tokens(k_blocks, 4).view(-1, 4)
    for group in range(6):
        b, h = divmod(group, 3)
        for r, row in enumerate(rows):
            for c, col in enumerate(cols):
                best = (q[b, row, h] @ k[b, col, h].T).max() / math.sqrt(8)
                torch.testing.assert_close(found[group, r, c], best)
    monkeypatch.setattr("longvid.sparsity.asa.CPU_SLAB", 1)
    torch.testing.assert_close(sampled_scores(q, k, q_blocks, k_blocks, 4), found)


@pytest.mark.parametrize(("mass", "min_keep", "max_keep"), [(0.6, 0, 1), (0.9, 0.2, 0.4), (0.1, 0.3, 0.5)])
def test_rows_keep_the_fewest_tiles_that_hold_the_mass_within_bounds(film, attend_by, mass, min_keep, max_keep):
    q, k, v = film(JOINT)
    _, layout = attend_by(make(mass=mass, min_keep=min_keep, max_keep=max_keep), (q, k, v), 0, JOINT, {})
    tiles = tiling(JOINT, 16, CPU, on_curve=True)
    scores = sampled_scores(q, k, tiles.q, tiles.k, 4).double()
    optional = tiles.optional.nonzero()[:, 0]
    mask = layout.mask()
    for head in range(4):
        for row in (~tiles.visible.all(1)).nonzero()[:, 0]:
            weights = scores[head, row, optional].softmax(-1).sort(descending=True).values
            needed = 1 + int((weights.cumsum(-1) < mass).sum())
            fewest, most = (round(x * len(optional)) for x in (min_keep, max_keep))
            kept = mask[head, row, optional]
            assert int(kept.sum()) == min(max(needed, fewest, 1), most)
            chosen = scores[head, row, optional]
            assert chosen[kept].min() >= chosen[~kept].max()


def test_nothing_is_remembered(film, attend_by):
    memory = {}
    attend_by(make(), film(FILM), 0, FILM, memory)
    assert memory == {}


def test_means_of_skipped_tiles_bring_the_output_nearer_to_dense(film, attend_by):
    inputs = film(FILM, noise=0.6)
    dense = attend(*inputs)
    outs = [attend_by(make(mass=0.5, pooled=pooled), inputs, 0, FILM, {})[0] for pooled in (False, True)]
    plain, pooled = ((out - dense).square().mean() for out in outs)
    assert pooled < plain


def test_tiles_on_the_curve_find_more_than_tiles_in_film_order(film, attend_by, monkeypatch):
    """The same share of tiles is nearer to dense where a tile's tokens are near each other in all directions."""
    wide = TokenMap(range(8), range(8), range(8), 8, 32)
    inputs = film(wide)
    dense = attend(*inputs)
    policy = make(tile=32, mass=0.5, min_keep=0.2, max_keep=0.2)
    on_curve = (attend_by(policy, inputs, 0, wide, {})[0] - dense).square().mean()
    monkeypatch.setattr("longvid.sparsity.asa.tiling", _in_film_order)
    in_order = (attend_by(policy, inputs, 0, wide, {})[0] - dense).square().mean()
    assert on_curve < in_order


def _in_film_order(tokens, size, device, on_curve):
    assert on_curve
    return tiling(tokens, size, device)
