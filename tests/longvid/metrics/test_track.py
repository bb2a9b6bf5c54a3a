"""Motions are read from tracks: thresholds, gaps, noise, and what is no motion at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.metrics.track import centres, read_motion
from longvid.training import world


def track(velocity_T2, start=(0.9, 0.1)):
    return ((np.asarray(start) + np.cumsum(velocity_T2, axis=0)) % 1.0).astype(np.float32)


@given(st.sampled_from(world.MOTIONS), st.integers(0, 10_000), st.integers(9, 60))
def test_every_motion_of_the_world_is_read_from_its_track(motion, seed, num_frames):
    rng = np.random.default_rng(seed)
    velocity = world.motion_velocity(rng, motion, num_frames)
    jitter = rng.normal(0, 0.001, (num_frames, 2))
    read = read_motion((track(velocity) + jitter).astype(np.float32) % 1.0)
    assert read.name == motion
    assert read.share > 0.7


def test_speed_turn_and_period_are_the_motions_own():
    line = read_motion(track(np.tile([0.02, 0.0], (40, 1))))
    assert line.speed == pytest.approx(0.02, rel=0.01)
    assert line.period_frames == pytest.approx(50, rel=0.01)
    angle = 0.1 * np.arange(40)
    orbit = read_motion(track(0.02 * np.stack([np.cos(angle), np.sin(angle)], axis=1)))
    assert orbit.turn == pytest.approx(0.1, rel=0.01)
    assert orbit.period_frames == pytest.approx(20 * np.pi, rel=0.01)
    assert read_motion(track(np.zeros((40, 2)))).period_frames is None


def test_motion_that_comes_latent_by_latent_is_steady():
    velocity = np.zeros((41, 2))
    velocity[::4, 1] = -0.08
    assert read_motion(track(velocity)).name == "up"


def test_a_track_that_turns_back_shows_no_motion():
    velocity = np.tile([0.02, 0.0], (40, 1))
    velocity[20:] *= -1
    assert read_motion(track(velocity)).name is None


def test_gaps_are_bridged_but_an_object_that_is_mostly_absent_has_no_motion():
    path = track(np.tile([-0.02, 0.0], (40, 1)))
    path[5:8] = path[20:27] = np.nan
    assert read_motion(path).name == "left"
    path[8:27] = np.nan
    assert read_motion(path).name is None


def test_centres_are_circular_means():
    cover = np.zeros((2, 8, 8), np.float32)
    cover[0, 0, 0] = cover[0, 0, 7] = cover[0, 7, 0] = cover[0, 7, 7] = 1
    assert np.minimum(centres(cover)[0], 1 - centres(cover)[0]) == pytest.approx(0, abs=1e-6)
    assert np.isnan(centres(cover)[1]).all()
