"""Blocks and layouts say what a look at each token by itself says."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels.layout import Blocks, even_blocks, make_layout, one_group, own_groups
from longvid.kernels.reference import token_mask


@pytest.fixture(scope="session")
def blocks(random_blocks):
    @st.composite
    def draw_blocks(draw, num_tokens):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        groups, count = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        return random_blocks(generator, num_tokens, count, groups, ordered=draw(st.booleans()))

    return draw_blocks


def members(blocks, group):
    """The tokens of each block, as lists."""
    offsets = blocks.offsets[group % len(blocks.offsets)].tolist()
    order = list(range(offsets[-1])) if blocks.order is None else blocks.order[group % len(blocks.order)].tolist()
    return [order[start:stop] for start, stop in itertools.pairwise(offsets)]


@given(data=st.data(), num_tokens=st.integers(1, 30))
def test_block_of_each_token(blocks, data, num_tokens):
    found = data.draw(blocks(num_tokens))
    assert found.lengths().sum(-1).tolist() == [num_tokens] * len(found.offsets)
    for group, row in enumerate(found.block_of(num_tokens).tolist()):
        expected = {token: n for n, tokens in enumerate(members(found, group)) for token in tokens}
        assert dict(enumerate(row)) == expected


@given(data=st.data(), num_tokens=st.integers(1, 30))
def test_blocks_keep_their_tokens(blocks, data, num_tokens):
    whole = data.draw(blocks(num_tokens))
    kept = data.draw(st.permutations(range(num_tokens)))[: data.draw(st.integers(0, num_tokens))]
    part = whole.keep(torch.tensor(kept, dtype=torch.int64), num_tokens)
    rank = {token: i for i, token in enumerate(kept)}
    for group in range(len(whole.offsets)):
        assert members(part, group) == [[rank[t] for t in tokens if t in rank] for tokens in members(whole, group)]


@given(num_tokens=st.integers(0, 40), size=st.integers(1, 17))
def test_even_blocks(num_tokens, size):
    lengths = even_blocks(num_tokens, size).lengths()[0].tolist()
    assert sum(lengths) == num_tokens and len(lengths) == -(-num_tokens // size)
    assert all(length == size for length in lengths[:-1])


@given(groups=st.integers(1, 3), rows=st.integers(1, 5), cols=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_layout_is_its_mask(groups, rows, cols, seed):
    mask = torch.rand(groups, rows, cols, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = make_layout(even_blocks(4 * rows, 4), even_blocks(4 * cols, 4), mask, one_group(2))
    assert torch.equal(layout.mask(), mask)
    for g in range(groups):
        for row in range(rows):
            tiles = layout.col[layout.row_ptr[g, row] : layout.row_ptr[g, row + 1]]
            assert tiles.tolist() == mask[g, row].nonzero().flatten().tolist()


@given(data=st.data(), num_queries=st.integers(1, 20), num_keys=st.integers(1, 20), batch=st.integers(1, 2))
def test_density_is_the_share_of_computed_scores(layouts, data, num_queries, num_keys, batch):
    layout = data.draw(layouts(num_queries, num_keys, batch, 3))
    expected = token_mask(layout, num_queries, num_keys).double().mean()
    torch.testing.assert_close(layout.density(), float(expected))


@given(data=st.data(), num_queries=st.integers(1, 20), num_keys=st.integers(1, 20))
def test_a_kept_layout_computes_the_scores_of_what_stays(layouts, data, num_queries, num_keys):
    layout = data.draw(layouts(num_queries, num_keys, 1, 3))
    q_tokens, k_tokens = (
        torch.tensor(data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))])
        for n in (num_queries, num_keys)
    )
    whole = token_mask(layout, num_queries, num_keys)
    part = layout.keep(q_tokens, k_tokens)
    assert torch.equal(token_mask(part, len(q_tokens), len(k_tokens)), whole[:, :, q_tokens][..., k_tokens])
    some = layout.keep(None, k_tokens)
    assert torch.equal(token_mask(some, num_queries, len(k_tokens)), whole[..., k_tokens])
    emptied = (part.q.lengths() == 0)[:, :, None] | (part.k.lengths() == 0)[:, None, :]
    assert not (part.mask() & emptied).any()


def test_groups_of_heads():
    assert own_groups(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    q = Blocks(torch.tensor([[0, 4]], dtype=torch.int32))
    layout = make_layout(q, q, torch.ones(3, 1, 1, dtype=torch.bool), own_groups(1, 3))
    assert layout.heads(1, 3).group.tolist() == [[1, 2]]
