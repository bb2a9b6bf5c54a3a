"""Selection keeps what its rule says, row by row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels import native
from longvid.kernels.select import greedy_area, top_k, top_p

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])  # few, so that there are ties


@st.composite
def row_sets(draw, values):
    num_heads, num_rows, columns = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    count = num_heads * num_rows * columns
    flat = draw(st.lists(values, min_size=count, max_size=count))
    return torch.tensor(flat).view(num_heads, num_rows, columns)


def by_falling(row):
    return sorted(range(len(row)), key=lambda column: (-row[column], column))


def as_mask(columns, like):
    mask = torch.zeros(len(like), dtype=torch.bool)
    mask[list(columns)] = True
    return mask


def assert_rows(found, scores, choose):
    for head in range(scores.shape[0]):
        for row in range(scores.shape[1]):
            values = scores[head, row].tolist()
            assert torch.equal(found[head, row], as_mask(choose(head, row, values), values)), (head, row)


@given(row_sets(LEVELS | st.sampled_from([math.inf, -math.inf])), st.integers(0, 12))
def test_top_k_keeps_k_of_the_largest_and_the_first_of_equals(scores, k):
    assert_rows(top_k(scores, k), scores, lambda head, row, values: by_falling(values)[: max(1, k)])


@given(row_sets(LEVELS), st.data())
def test_top_k_with_counts_of_heads_or_rows(scores, data):
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 10), min_size=6, max_size=6))).view(2, 3)
    counts = counts[: scores.shape[0], : scores.shape[1]]
    found, of_heads = top_k(scores, counts), top_k(scores, counts[:, 0])
    assert_rows(found, scores, lambda head, row, values: by_falling(values)[: max(1, counts[head, row])])
    assert_rows(of_heads, scores, lambda head, row, values: by_falling(values)[: max(1, counts[head, 0])])


@given(row_sets(LEVELS), st.floats(0, 1), st.integers(1, 4), st.integers(4, 9) | st.none())
def test_top_p_is_the_smallest_set_that_holds_the_share(weights, share, fewest, most):
    def choose(_head, _row, values):
        order, held, count = by_falling(values), 0.0, 0
        while count < len(values) and held < share * sum(values) - 1e-6:
            held += values[order[count]]
            count += 1
        return order[: min(max(count, fewest), len(values) if most is None else most)]

    found = top_p(weights, share, min_keep=fewest, max_keep=most)
    near = (torch.arange(1, 100) * 0.25 - share * weights.sum(-1, keepdim=True)).abs().amin() < 1e-5
    if not near:  # else rounding decides
        assert_rows(found, weights, choose)
    assert (found.sum(-1) >= 1).all()


@given(row_sets(LEVELS), st.data())
def test_greedy_area_stops_before_the_budget_is_exceeded(scores, data):
    areas = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=54, max_size=54))).view(2, 3, 9)
    areas = areas[: scores.shape[0], : scores.shape[1], : scores.shape[2]]
    budget = torch.tensor(data.draw(st.lists(st.integers(0, 20), min_size=6, max_size=6))).view(2, 3)
    budget = budget[: scores.shape[0], : scores.shape[1]]

    def choose(head, row, values):
        kept, used = [], 0
        for column in by_falling(values):
            used += int(areas[head, row, column])
            if kept and used > budget[head, row]:
                break
            kept.append(column)
        return kept

    assert_rows(greedy_area(scores, areas, budget), scores, choose)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_top_p_of_attention_weights_holds_the_share_and_not_a_column_more(share):
    weights = torch.randn(2, 50, 200, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    mask = top_p(weights, share)
    held = (weights * mask).double().sum(-1)
    least = weights.masked_fill(~mask, math.inf).amin(-1).double()
    assert (held >= share - 1e-5).all() and (held - least < share + 1e-5).all()


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_the_c_plus_plus_selection_is_torch_s(monkeypatch):
    """Of attention weights, and of few levels with ties; many rows, so that several threads share them."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 90, 500, generator=generator).mul(2).softmax(-1)
    weights[1] = (weights[1] * 500).round() / 500
    counts = torch.randint(0, 600, (2, 90), generator=generator)
    area = torch.randint(0, 50, weights.shape, generator=generator)
    budget = torch.randint(0, 9000, (2, 90), generator=generator)
    signed = weights.roll(1, -1) - weights
    signed[0, 0, :3] = torch.tensor([-0.0, math.nan, math.inf])

    def choose():
        by_mass = top_p(weights, 0.7, 20, 90), top_p(weights, 0.9)
        return top_k(signed, counts), *by_mass, greedy_area(signed, area, budget)

    found = choose()
    monkeypatch.setattr(native, "is_available", lambda: False)
    for mine, expected in zip(found, choose(), strict=True):
        assert torch.equal(mine, expected)
