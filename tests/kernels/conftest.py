"""Ragged blocks and layouts, drawn at random. Fixtures, since test modules cannot import each other."""

import pytest
import torch
from hypothesis import strategies as st

from longvid.kernels.layout import Blocks, make_layout


@pytest.fixture(scope="session")
def random_blocks():
    """random_blocks(generator, num_tokens, num_blocks, groups, ordered=) -> Blocks."""
    return _random_blocks


@pytest.fixture(scope="session")
def layouts():
    """layouts(num_queries, num_keys, batch, num_heads): a strategy of BlockLayouts."""
    return _layouts


def _random_blocks(generator, num_tokens, num_blocks, groups, *, ordered):
    """Ragged blocks, some of them empty, in the tokens' own order or in a random one."""
    cuts = torch.randint(0, num_tokens + 1, (groups, num_blocks - 1), generator=generator).sort(-1).values
    ends = torch.tensor([0, num_tokens]).expand(groups, 2)
    offsets = torch.cat([ends[:, :1], cuts, ends[:, 1:]], dim=1).int()
    if ordered:
        return Blocks(offsets)
    return Blocks(offsets, torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(groups)]).int())


@st.composite
def _layouts(draw, num_queries, num_keys, batch, num_heads):
    """Layouts of several groups; blocks and orders are of each group or of all; heads may be skipped."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    groups = draw(st.integers(1, 3))
    q, k = (
        _random_blocks(
            generator, tokens, draw(st.integers(1, 5)), draw(st.sampled_from([1, groups])), ordered=draw(st.booleans())
        )
        for tokens in (num_queries, num_keys)
    )
    density = draw(st.sampled_from([0.0, 0.4, 1.0]))
    mask = torch.rand(groups, q.num_blocks, k.num_blocks, generator=generator) < density
    rows = draw(st.sampled_from([1, batch]))
    group = torch.randint(draw(st.sampled_from([-1, 0])), groups, (rows, num_heads), generator=generator)
    return make_layout(q, k, mask, group)
