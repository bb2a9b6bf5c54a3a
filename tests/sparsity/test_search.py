"""The search for heads' patterns finds those that were planted."""

import math

import pytest
import torch

from longvid.sparsity.profile import FULL, SKIP, Costs, Pattern
from longvid.sparsity.search import PATTERNS, Sample, Search, choose, judge, measure_costs, search
from longvid.sparsity.tokens import TokenMap

LATENTS, HEIGHT, WIDTH = 8, 8, 16
TOKENS = TokenMap(range(LATENTS), range(LATENTS), range(LATENTS), HEIGHT, WIDTH)
COSTS = Costs(score_s=1e-9, tile_s=0.0, token_s=0.0, dense_score_s=1e-9)
DIM = 32


def near(place, width):
    """Features whose products fall off beyond a distance: attention to neighbours on a line."""
    frequency = torch.randn(DIM // 2, generator=torch.Generator().manual_seed(3)) / width
    angle = place[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1) * 7


def planted(kind, draw):
    """q, k, v [T, D] of a head with a pattern; values are noise, so that an output shows which keys were read."""
    num_tokens = TOKENS.num_keys
    token = torch.arange(num_tokens)
    v = torch.randn(num_tokens, DIM, generator=draw)
    if kind == "diagonal":
        return near(token, 8), near(token, 8), v
    if kind == "multi_diagonal":
        return near(token % 128, 2), near(token % 128, 2), v
    if kind == "vertical":
        q = torch.ones(num_tokens, DIM) + 0.1 * torch.randn(num_tokens, DIM, generator=draw)
        sharp = 3.0 * torch.randn(num_tokens, DIM, generator=draw)
        return q, torch.where((token < 128)[:, None], sharp.abs(), -5.0), v
    if kind == "skip":
        return near(token, 8), near(token, 8), 0.01 * v
    far = torch.randperm(num_tokens, generator=draw)
    k = torch.nn.functional.normalize(torch.randn(num_tokens, DIM, generator=draw), dim=-1) * 10
    return k[far], k, v


def sample_of(*heads, layer=0):
    draw = torch.Generator().manual_seed(layer)
    q, k, v = (torch.stack(x, 1)[None] for x in zip(*(planted(kind, draw) for kind in heads), strict=True))
    return Sample(layer, q, k, v, TOKENS)


def test_each_head_gets_the_pattern_that_was_planted():
    heads = ["diagonal", "multi_diagonal", "vertical", "full", "diagonal", "multi_diagonal"]
    samples = [sample_of(*heads), sample_of(*reversed(heads), layer=1)]
    profile = search(samples, "m", COSTS, Search())
    assert [pattern.mode for pattern in profile.layers[0]] == heads
    assert [pattern.mode for pattern in profile.layers[1]] == heads[::-1]
    assert profile.layers[0][0].window <= 0.5
    assert (profile.num_layers, profile.num_heads, profile.model, profile.tile) == (2, 6, "m", 64)


def test_errors_are_shares_of_the_layer_s_variance():
    sample = sample_of("diagonal", "skip", "full")
    errors, savings = judge(sample, COSTS, Search(patterns=(SKIP, FULL)))
    assert savings.tolist() == [1.0, pytest.approx(0.0, abs=1e-6)]
    assert errors[1].max() < 1e-6
    assert errors[0, 1] < 1e-3 < errors[0, 0]
    larger = Sample(0, sample.q_BLHD, sample.k_BTHD, 100 * sample.v_BTHD, TOKENS)
    assert torch.allclose(judge(larger, COSTS, Search(patterns=(SKIP, FULL)))[0][0], errors[0])


def test_no_more_heads_are_skipped_than_allowed():
    # 20 heads of which 4 could be skipped: 6 % of 20 is one, that with the least error.
    errors = torch.full((2, 2, 10), 1.0)
    errors[1, 0, :4] = torch.tensor([0.02, 0.01, 0.02, 0.03])
    errors[:, 1] = 0.001
    chosen = choose(errors, torch.tensor([[1.0, 0.5]]).expand(2, -1), Search(patterns=(SKIP, Pattern(mode="diagonal"))))
    assert chosen[0].tolist() == [2] * 10
    assert chosen[1].tolist() == [2, 1, *[2] * 8]
    none = choose(errors, torch.ones(2, 2), Search(patterns=(SKIP, Pattern(mode="diagonal")), max_skipped=0.0))
    assert (none == 2).all()


@pytest.mark.parametrize(
    ("error", "saving", "chosen"), [(0.04, 0.5, 1), (0.06, 0.9, 0), (0.04, 0.05, 0), (0.0, -0.2, 0), (math.nan, 0.9, 0)]
)
def test_a_head_stays_full_where_the_error_is_large_or_little_is_saved(error, saving, chosen):
    how = Search(patterns=(Pattern(mode="diagonal"),))
    assert choose(torch.full((1, 1, 1), error), torch.full((1, 1), saving), how).item() == chosen


def test_a_layer_without_a_sample_is_refused():
    with pytest.raises(ValueError, match="every layer"):
        search([sample_of("full", layer=1)], "m", COSTS, Search(patterns=(SKIP,)))
    with pytest.raises(ValueError, match="every layer"):
        search([], "m", COSTS, Search())


def test_costs_are_measured():
    costs = measure_costs(head_dim=16)
    assert 0 < costs.score_s < 1e-6 and 0 < costs.dense_score_s < 1e-6
    assert costs.saving(4096, 4096, 0.05, 200) > costs.saving(4096, 4096, 0.5, 2000)


def test_savings_are_shares_of_the_dense_time():
    costs = Costs(score_s=2.0, tile_s=100.0, token_s=10.0, dense_score_s=4.0)
    assert costs.saving(10, 20, 0.25, 2) == 1 - (0.25 * 200 * 2 + 2 * 100 + 30 * 10) / (200 * 4)


def test_the_patterns_of_the_search_are_all_different():
    assert len(set(PATTERNS)) == len(PATTERNS)
