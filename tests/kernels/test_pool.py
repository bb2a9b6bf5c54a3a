"""Pooled blocks against the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.kernels import reference
from longvid.kernels.layout import Blocks, even_blocks
from longvid.kernels.pool import pool


def assert_pools(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    ordered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_lengths_shared_by_all_heads(lengths, ordered, dtype, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, sum(lengths), 3, 5).to(dtype)
    order = torch.randperm(sum(lengths))[None].int() if ordered else None
    blocks = Blocks(torch.tensor([[0, *lengths]]).cumsum(-1).int(), order)
    assert_pools(pool(x, blocks), reference.pool(x, blocks))


@pytest.mark.parametrize("ordered", [False, True])
def test_every_head_with_blocks_of_its_own(ordered):
    torch.manual_seed(0)
    x = torch.randn(2, 30, 3, 4)
    offsets = torch.cat([torch.zeros(6, 1), torch.randint(0, 31, (6, 3)).sort(-1).values, torch.full((6, 1), 30)], 1)
    order = torch.stack([torch.randperm(30) for _ in range(6)]).int() if ordered else None
    found = pool(x, Blocks(offsets.int(), order))
    for group in range(6):
        b, h = divmod(group, 3)
        own = Blocks(offsets[group : group + 1].int(), None if order is None else order[group : group + 1])
        assert_pools([y[b, h] for y in found], [y[0, 0] for y in reference.pool(x[b : b + 1, :, h : h + 1], own)])


def test_blocks_of_a_wrong_number_of_groups_are_refused():
    blocks = even_blocks(16, 4)
    with pytest.raises(ValueError, match=r"offsets \[2, 5\] must be of one group or of one a head \(1 × 3\)"):
        pool(torch.zeros(1, 16, 3, 4), Blocks(blocks.offsets.expand(2, -1)))
