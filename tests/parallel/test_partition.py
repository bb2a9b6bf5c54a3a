"""Layers are dealt out as a search through all ways would."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.parallel.partition import Costs, split_layers

TIMES = st.floats(0.01, 10)


@st.composite
def costs_and_stages(draw):
    layers = tuple(draw(st.lists(TIMES, min_size=1, max_size=8)))
    costs = Costs(layers, draw(TIMES), draw(TIMES), draw(TIMES))
    return costs, draw(st.integers(1, len(layers)))


@given(costs_and_stages())
def test_the_slowest_stage_is_as_fast_as_can_be(case):
    costs, num_stages = case
    spans = split_layers(costs, num_stages)
    num_layers = len(costs.layers)
    assert [layer for span in spans for layer in span] == list(range(num_layers))
    assert len(spans) == num_stages and all(len(span) for span in spans)
    best = min(
        max(costs.of_stages([range(a, b) for a, b in pairwise((0, *cuts, num_layers))]))
        for cuts in combinations(range(1, num_layers), num_stages - 1)
    )
    assert max(costs.of_stages(spans)) == pytest.approx(best)


def test_who_decodes_has_fewer_layers():
    assert split_layers(Costs((1.0,) * 10, decode=4.0), 2) == (range(3), range(3, 10))
