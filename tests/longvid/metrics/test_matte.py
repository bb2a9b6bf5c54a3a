"""Object and background are told apart, on shaded grounds and across edges; noise adds nothing to the object."""

from __future__ import annotations

import numpy as np
import pytest

from longvid.metrics.matte import count_pieces, find_object, fit_ground
from longvid.training import world


def draw(look, num_frames=9, seed=0):
    return world.make_clip(np.random.default_rng(seed), num_frames, 64, looks=[look], change_share=0).frames


@pytest.mark.parametrize("motion", ["still", "left"])
def test_the_ground_is_found_under_a_large_object(motion):
    frames = draw(world.Look("white", "red", "square", "large", motion, shaded=True))
    top, bottom = np.array(world.PALETTE["red"]), np.array(world.PALETTE["red"]) * 0.72
    ramp = np.linspace(0, 1, 64)[:, None]
    assert np.abs(fit_ground(frames) - (top * (1 - ramp) + bottom * ramp)).max() < 2


@pytest.mark.parametrize("noise", [0, 4])
def test_the_cover_has_the_area_of_the_object_and_nothing_else(noise):
    frames = draw(world.Look("orange", "yellow", "circle", "small", "right", shaded=True))
    noisy = frames + np.random.default_rng(0).normal(0, noise, frames.shape)
    matte = find_object(np.clip(noisy, 0, 255).astype(np.uint8))
    assert matte.cover_THW.sum(axis=(1, 2)) == pytest.approx(np.pi * (0.13 * 64) ** 2, rel=0.1)
    assert np.abs(matte.colour_T3 - world.PALETTE["orange"]).max() < 4


def test_a_frame_without_the_object_has_no_cover_and_no_colour():
    frames = draw(world.Look("black", "white", "circle", "small", "still")).copy()
    frames[3] = frames[0, 0, 0]
    matte = find_object(frames)
    assert matte.cover_THW[3].sum() == 0
    assert np.isnan(matte.colour_T3).any(axis=1).tolist() == [t == 3 for t in range(9)]


def test_pieces_join_across_the_edges_and_specks_do_not_count():
    cover = np.zeros((4, 32, 32), np.float32)
    cover[0, 10:20, :4] = cover[0, 10:20, -4:] = 1  # one piece across the left and right edges
    cover[1, :4, :4] = cover[1, -4:, -4:] = cover[1, :4, -4:] = cover[1, -4:, :4] = 1  # and one across all four corners
    cover[2, 4:12, 4:12] = cover[2, 20:28, 20:28] = 1
    cover[2, 0:2, 28:30] = 1  # a speck
    assert count_pieces(cover).tolist() == [1, 1, 2, 0]
