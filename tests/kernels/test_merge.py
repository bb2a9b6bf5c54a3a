"""Partial attention merged by its LSE is attention to all keys."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels.dense import attend_lse, attend_lse_exact
from longvid.kernels.merge import merge_partials


def attention_fp64(q, k, v):
    """Output and LSE by the definition, in fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def random(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    queries=st.integers(1, 7),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_merged_partials_are_attention_to_all_keys(seed, lengths, queries, scale):
    total = sum(lengths)
    q, k, v = (
        random(seed + i, 1, n, 2, 8, scale=s) for i, (n, s) in enumerate([(queries, scale), (total, 1), (total, 1)])
    )
    partials = [attend_lse(q, *block) for block in zip(k.split(lengths, 1), v.split(lengths, 1), strict=True)]
    out, lse = partials[0]
    for partial in partials[1:]:
        out, lse = merge_partials(out, lse, *partial)
    expected_out, expected_lse = attention_fp64(q, k, v)
    torch.testing.assert_close(out, expected_out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=2e-5)


@given(seed=st.integers(0, 1000))
def test_the_order_of_merging_does_not_matter(seed):
    a, b = (attend_lse_exact(*(random(10 * seed + 3 * i + j, 1, 4, 2, 8) for j in range(3))) for i in range(2))
    for one, other in zip(merge_partials(*a, *b), merge_partials(*b, *a), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_without_keys_weigh_nothing():
    out, lse = random(1, 1, 4, 2, 8), random(2, 1, 4, 2)
    empty_out, empty_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for merged in (merge_partials(out, lse, empty_out, empty_lse), merge_partials(empty_out, empty_lse, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_rows_without_keys_on_both_sides_stay_empty():
    out, lse = torch.zeros(1, 4, 2, 8), torch.full((1, 4, 2), -math.inf)
    lse[:, 1] = 2.0
    out[:, 1] = 3.0
    merged_out, merged_lse = merge_partials(out, lse, torch.zeros_like(out), torch.full_like(lse, -math.inf))
    assert torch.equal(merged_out, out) and torch.equal(merged_lse, lse)


@pytest.mark.parametrize("lse", [-1e4, 1e4])
def test_lse_of_any_size_do_not_overflow(lse):
    a, b = torch.full((1, 1, 1, 4), 1.0), torch.full((1, 1, 1, 4), 3.0)
    out, merged = merge_partials(a, torch.full((1, 1, 1), lse), b, torch.full((1, 1, 1), lse))
    torch.testing.assert_close(out, torch.full_like(out, 2.0))
    assert merged.item() == pytest.approx(lse + math.log(2), rel=1e-6)


def test_half_precision_is_merged_in_fp32():
    partials = [attend_lse(*(random(3 * i + j, 1, 5, 2, 8).bfloat16() for j in range(3))) for i in range(2)]
    out, lse = merge_partials(*partials[0], *partials[1])
    assert out.dtype == lse.dtype == torch.float32
