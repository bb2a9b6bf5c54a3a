"""Forecasts are the Taylor series of TaylorSeer, and go on after a save as if nothing had been."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.cache.settings import NoCache, StaticTable, TaylorSeer
from longvid.cache.solver import CachingSampler
from longvid.sampler import EulerSampler, Forecaster

SIGMAS = tuple(1 - k / 12 for k in range(13))


def solver_of(order):
    solver = CachingSampler(EulerSampler(SIGMAS), order).new_solver()
    assert isinstance(solver, Forecaster)
    return solver


@given(st.integers(0, 3), st.lists(st.floats(-2, 2), min_size=1, max_size=4))
def test_a_polynomial_of_the_order_is_forecast_from_consecutive_steps(order, coefficients):
    """Differences of a polynomial are exact for order 1; of higher ones they are TaylorSeer's backward differences."""
    coefficients = coefficients[: min(order, 1) + 1]
    solver, x = solver_of(order), torch.zeros(2, dtype=torch.float64)
    for k in range(5):
        solver.step(torch.full((2,), sum(c * k**j for j, c in enumerate(coefficients))), k, x)
    expected = sum(c * 7**j for j, c in enumerate(coefficients))
    assert solver.forecast(7)[0].item() == pytest.approx(expected, abs=1e-4)


def test_terms_are_differences_over_the_distance_between_computed_steps():
    solver, x = solver_of(2), torch.zeros(1)
    velocities = {0: 1.0, 1: 3.0, 4: 0.0}
    for k, v in velocities.items():
        solver.step(torch.tensor([v]), k, x)
    first = (0.0 - 3.0) / 3
    second = (first - 2.0) / 3
    assert solver.forecast(6).item() == pytest.approx(0.0 + first * 2 + second * 4 / math.factorial(2))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_not_learned_from_and_a_saved_solver_goes_on_to_the_last_bit(order):
    draw = torch.Generator().manual_seed(0)
    velocities, x = torch.randn(12, 3, 2, generator=draw), torch.randn(3, 2, generator=draw)
    one, two = solver_of(order), solver_of(order)
    for k in range(12):
        forecast = k in (4, 5, 7, 8)
        found = [solver.step(solver.forecast(k) if forecast else velocities[k], k, x) for solver in (one, two)]
        assert torch.equal(*found)
        saved, two = two.state(), solver_of(order)
        two.load_state(saved)
        x = found[0]


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 60))
def test_the_first_and_the_last_steps_are_computed_and_no_gap_is_longer_than_the_interval(interval, first, steps):
    skipped = TaylorSeer(policy="taylorseer", interval=interval, first_steps=first).forecast_steps(steps)
    computed = sorted(set(range(steps)) - skipped)
    assert set(range(min(first, steps))) <= set(computed) and steps - 1 in computed
    gaps = [b - a for a, b in pairwise(computed)]
    assert all(gap <= interval for gap in gaps)
    assert all(gap == interval for gap in gaps[first - 1 : -1])


def test_a_table_says_which_steps_are_computed():
    assert StaticTable(policy="static", computed=(2, 3)).forecast_steps(6) == {1, 4}
    assert NoCache().forecast_steps(6) == frozenset()
