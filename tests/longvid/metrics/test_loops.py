"""A film that starts anew again and again is a loop; what moves periodically, wanders or rests is none."""

from __future__ import annotations

import numpy as np
import pytest

from longvid.metrics.loops import LoopDetector
from longvid.metrics.temporal import Moment, feed
from longvid.metrics.track import centres, read_motion
from longvid.training import world

FPS = 16


def returns(frames, section_of=lambda index: 0):
    detector = LoopDetector(FPS)
    feed((Moment(i, section_of(i), frame) for i, frame in enumerate(frames)), [detector])
    return detector.value()


def moving(num_frames, speed=0.02, restart_every=None):
    """A disc that crosses the torus; with a restart, it jumps back to its start."""
    steps = np.full(num_frames, speed)
    if restart_every:
        steps[restart_every::restart_every] = -speed * (restart_every - 1)
    velocity = np.zeros((num_frames, 2), np.float32)
    velocity[:-1, 0] = steps[1:]
    looks = [world.Look("red", "white", "circle", "large", "right")]
    return world.draw(looks, np.ones((num_frames, 1), np.float32), world.Track((0.3, 0.5), velocity), 64)


def test_motion_across_the_torus_comes_back_at_its_own_period_and_is_no_loop():
    found = returns(moving(300))[0]
    assert found.lag_frames % 50 in (0, 1, 49)
    assert found.relative > 0.98
    assert not found.is_loop(50.0)
    assert found.is_loop(None)


def test_the_period_of_an_orbit_explains_its_return():
    clip = world.make_clip(
        np.random.default_rng(1), 400, 64, looks=[world.Look("red", "white", "ring", "large", "orbit")]
    )
    dark = 1 - clip.frames[:, :, :, 1].astype(np.float32) / 255
    period = read_motion(centres(np.where(dark > 0.3, dark, 0))).period_frames
    assert not returns(clip.frames)[0].is_loop(period)


@pytest.mark.parametrize("chunk", [24, 36])
def test_a_film_that_starts_anew_with_every_chunk_is_a_loop(chunk):
    found = returns(moving(300, restart_every=chunk))[0]
    assert found.lag_frames % chunk == 0
    assert found.similarity == pytest.approx(1, abs=1e-6)
    assert found.is_loop(50.0)


def test_a_loop_of_several_periods_with_a_jump_is_a_loop():
    frames = np.tile(moving(130), (4, 1, 1, 1))  # 2.6 periods of 50 frames
    found = returns(frames)[0]
    assert found.lag_frames == 130
    assert found.is_loop(50.0)


def test_noise_on_a_loop_does_not_hide_it():
    frames = moving(300, restart_every=24)
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    assert returns(noisy)[0].is_loop(50.0)


def test_a_film_that_wanders_has_no_loop():
    rng = np.random.default_rng(0)
    heading = np.cumsum(rng.normal(0, 0.15, 400))
    velocity = (0.02 * np.stack([np.cos(heading), np.sin(heading)], axis=1)).astype(np.float32)
    looks = [world.Look("red", "white", "circle", "large", "right")]
    frames = world.draw(looks, np.ones((400, 1), np.float32), world.Track((0.3, 0.5), velocity), 64)
    found = returns(frames).get(0)
    assert found is None or not found.is_loop(None)


def test_a_scene_at_rest_has_no_return():
    rest = np.tile(moving(1), (100, 1, 1, 1))
    noisy = np.clip(rest + np.random.default_rng(0).normal(0, 4, rest.shape), 0, 255).astype(np.uint8)
    assert returns(rest) == {}
    assert returns(noisy) == {}


def test_sections_are_measured_apart():
    film = np.concatenate([moving(150, restart_every=24), moving(150)])
    found = returns(film, lambda index: index // 150)
    assert found[0].is_loop(50.0)
    assert not found[1].is_loop(50.0)
