"""The search finds what trying everything finds."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.cache.plan import MODULES
from longvid.cache.search import choose_modules, choose_steps, forecast_errors, most_volatile
from longvid.cache.table import computed_share


def gram_of(values):
    return values @ values.T


def errors_by_hand(values, computed, order):
    """What each step's forecast is off by, relative to its value."""
    errors = {}
    for k in range(len(values)):
        past = [step for step in computed if step <= k]
        if past[-1] == k:
            continue
        forecast = values[past[-1]]
        if order and len(past) > 1:
            slope = (values[past[-1]] - values[past[-2]]) / (past[-1] - past[-2])
            forecast = forecast + slope * (k - past[-1])
        errors[k] = np.linalg.norm(forecast - values[k]) / np.linalg.norm(values[k])
    return errors


@given(st.integers(0, 99), st.integers(3, 8), st.integers(2, 8), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=60)
def test_steps_are_the_best_of_all_choices(seed, num_steps, count, order):
    draw = np.random.default_rng(seed)
    values, sensitivity = draw.normal(size=(num_steps, 5)) + 1, draw.uniform(0.1, 2, num_steps)
    count = min(count, num_steps)

    def cost(computed):
        return sum(sensitivity[k] * error for k, error in errors_by_hand(values, computed, order).items())

    found = choose_steps(gram_of(values), sensitivity, count, order)
    choices = [(0, *middle, num_steps - 1) for middle in combinations(range(1, num_steps - 1), count - 2)]
    assert found in choices
    assert cost(found) == pytest.approx(min(map(cost, choices)), abs=1e-6)


def test_errors_are_those_of_the_forecast():
    values = np.random.default_rng(1).normal(size=(7, 4))
    by_hand = errors_by_hand(values, [0, 2], 1)
    assert forecast_errors(gram_of(values), 0, 2, 1)[3:] == pytest.approx([by_hand[k] for k in range(3, 7)])


def test_feed_forwards_take_volatile_layers_before_them_along():
    """Layer 1 changes at every step; who computes a later feed-forward computes that of layer 1."""
    draw, steps = np.random.default_rng(0), 8
    base = draw.normal(size=(1, 6))
    grams = {
        (layer, module): gram_of(base + (2.0 if layer == 1 else 0.01) * draw.normal(size=(steps, 6)))
        for layer in range(4)
        for module in MODULES
    }
    assert most_volatile({name: gram for name, gram in grams.items() if name[1] == "ffn"}, 0.25) == [1]
    alone = choose_modules(grams, 3, 0.0)
    rows = choose_modules(grams, 3, 0.25)
    assert not rows[0] and not rows[-1]
    assert sum(map(len, alone)) == (steps - 3) * len(grams)
    for row in rows:
        if any((layer, "ffn") not in row for layer in (2, 3)):
            assert (1, "ffn") not in row
    assert computed_share(rows, 4) > 3 / steps


@pytest.mark.parametrize(("count", "order"), [(1, 1), (9, 1), (3, 2)])
def test_what_cannot_be_chosen_is_refused(count, order):
    with pytest.raises(ValueError, match="cannot be chosen"):
        choose_steps(np.eye(8), np.ones(8), count, order)
