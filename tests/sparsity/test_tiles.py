"""Tiles keep text, context and own latents apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.sparsity.tiles import density_of, own_keys, tiling
from longvid.sparsity.tokens import TokenMap

CPU = torch.device("cpu")


@st.composite
def token_maps(draw):
    keys = draw(st.integers(1, 6))
    first = draw(st.integers(0, 9))
    edges = sorted(draw(st.lists(st.integers(0, keys), min_size=4, max_size=4)))
    before, start, stop, behind = (first + edge for edge in edges)
    own = range(start, stop) if start < stop else range(first, first + keys)
    queries = range(min(before, own.start), max(behind, own.stop)) if draw(st.booleans()) else own
    text = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return TokenMap(queries, range(first, first + keys), own, draw(st.integers(1, 5)), draw(st.integers(1, 5)), *text)


def kinds(tokens, latents):
    """What each token is: text, the latent that it is of, and its place in that."""
    text_before, text_behind = ([("text", i) for i in range(n)] for n in (tokens.text_before, tokens.text_behind))
    places = [(latent, i) for latent in latents for i in range(tokens.per_latent)]
    return text_before + places + text_behind


@given(tokens=token_maps(), size=st.integers(1, 20), on_curve=st.booleans())
def test_every_tile_is_of_one_kind_and_visible_accordingly(tokens, size, on_curve):
    tiles = tiling(tokens, size, CPU, on_curve=on_curve)
    q_kinds, k_kinds = kinds(tokens, tokens.queries), kinds(tokens, tokens.keys)
    q_block, k_block = (x.block_of(len(y))[0] for x, y in ((tiles.q, q_kinds), (tiles.k, k_kinds)))
    assert tiles.q.lengths().max() <= size and tiles.k.lengths().max() <= size
    assert tiles.q.lengths().min() >= 1 and tiles.k.lengths().min() >= 1
    visible, own = tiles.visible[q_block][:, k_block], tiles.own[q_block][:, k_block]
    for i, (query, _) in enumerate(q_kinds):
        for j, (key, _) in enumerate(k_kinds):
            assert visible[i, j] == (query == "text" or key == "text" or key not in tokens.own)
    for i, query in enumerate(q_kinds):
        if query[0] != "text":
            assert own[i, k_kinds.index(query)]
    assert own_keys(tokens).stop - own_keys(tokens).start == len(tokens.own) * tokens.per_latent
    assert tiles.num_optional == len(
        {b for b, (latent, _) in zip(k_block.tolist(), k_kinds, strict=True) if latent in tokens.own}
    )


@given(tokens=token_maps())
def test_density_counts_what_is_visible(tokens):
    tiles = tiling(tokens, 1, CPU)
    assert density_of(tokens, 0) == pytest.approx(tiles.visible.double().mean().item())
    assert density_of(tokens, 1) == 1


def test_tiles_do_not_depend_on_where_in_the_film_they_are():
    here = TokenMap(range(3, 6), range(2, 7), range(3, 6), 4, 5)
    there = TokenMap(range(103, 106), range(102, 107), range(103, 106), 4, 5)
    assert tiling(here, 16, CPU) is tiling(there, 16, CPU)
