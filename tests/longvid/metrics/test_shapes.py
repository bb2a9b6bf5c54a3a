"""Drawn shapes overlap their own kind fully wherever they lie, sharp and rounded; circles stay circles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.metrics.shapes import fit_shapes
from longvid.training import world

places = st.floats(0, 1, exclude_max=True, width=32)


def cover_of(shape, radius, x, y, side=64, rounding=0.0):
    """The share of each pixel that a shape covers; rounded, its distance is mixed with that of a circle."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side
    dx, dy = np.meshgrid((axis - x + 0.5) % 1 - 0.5, (axis - y + 0.5) % 1 - 0.5)
    distance = world.signed_distance(shape, dx, dy, np.float32(radius))
    distance = (1 - rounding) * distance + rounding * (np.hypot(dx, dy) - np.float32(0.9 * radius))
    cover = np.clip(0.5 - distance * side, 0, 1)[None].astype(np.float32)
    return cover, np.array([[x, y]], np.float32)


@given(st.sampled_from(world.SHAPES), st.sampled_from(list(world.SIZES)), places, places)
def test_a_drawn_shape_overlaps_itself_and_no_other(shape, size, x, y):
    overlaps, radii = fit_shapes(*cover_of(shape, world.SIZES[size], x, y))
    own = world.SHAPES.index(shape)
    assert overlaps[0].argmax() == own
    assert overlaps[0, own] > 0.93
    assert radii[0, own] == pytest.approx(world.SIZES[size], rel=0.03)


@given(st.sampled_from(["square", "diamond"]), places, places)
def test_shapes_that_are_halfway_round_are_still_themselves(shape, x, y):
    overlaps, _ = fit_shapes(*cover_of(shape, world.SIZES["small"], x, y, rounding=0.5))
    assert overlaps[0].argmax() == world.SHAPES.index(shape)
