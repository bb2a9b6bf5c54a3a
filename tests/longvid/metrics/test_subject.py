"""The subject of drawn films: what stays as it is does not drift, and what changes is told by how much."""

from dataclasses import replace

import numpy as np
import pytest

from longvid.metrics.matte import find_object
from longvid.metrics.subject import SubjectMeter
from longvid.training import world

LOOK = world.Look("red", "blue", "square", "large", "right")
FRAMES = 192


def measured(look, velocity, growth=0.0, sizes=("large", "large")):
    """A film in four clips, of an object at these pixels a frame; it turns into one of another size on the way."""
    looks = [replace(look, size=size) for size in sizes]
    weights = np.linspace([1, 0], [0, 1], FRAMES).astype(np.float32)
    velocities = np.tile(np.asarray(velocity, np.float32) / 64, (FRAMES, 1))
    velocities *= 1 + growth * np.arange(FRAMES, dtype=np.float32)[:, None] / FRAMES
    frames = world.draw(looks, weights, world.Track((0.4, 0.5), velocities), 64)
    meter = SubjectMeter(look.motion)
    for clip in np.split(frames, 4):
        meter.push(clip, find_object(clip))
    return meter.value()


def test_a_steady_film_is_consistent_and_does_not_drift():
    found = measured(LOOK, (1.3, 0))
    assert found["subject_consistency"] > 0.99 and found["background_consistency"] > 0.9999
    assert found["jolt"] < 0.1
    assert max(found["drift"].values()) < 0.5 and max(found["wander"].values()) < 0.5


def test_what_leaves_its_line_or_grows_slower_or_smaller_is_told_by_how_much():
    slow = measured(LOOK, (1.0, 0), growth=-0.5)["drift"]
    assert (
        slow["speed"] == pytest.approx(100 * (1 - (1 - 0.5 * 0.875) / (1 - 0.5 * 0.125)), abs=2) and slow["path"] < 0.5
    )
    aside = measured(LOOK, (1.0, 0.1))
    assert aside["drift"]["path"] == pytest.approx(0.1 * FRAMES * 3 / 4, abs=0.5)
    assert aside["wander"]["path"] == pytest.approx(0.1 * FRAMES * 2 / 4, abs=0.5)
    small = measured(LOOK, (1.0, 0), sizes=("large", "small"))
    ratio = world.SIZES["small"] / world.SIZES["large"]
    assert small["drift"]["size"] == pytest.approx(100 * (1 - ratio) * 3 / 4 / (1 - (1 - ratio) / 8), abs=2)
    assert small["subject_consistency"] < 0.97


def test_an_object_at_rest_has_no_speed_and_one_that_is_gone_is_not_consistent():
    still = measured(replace(LOOK, motion="still"), (0, 0))
    assert still["drift"]["speed"] is None and still["drift"]["path"] < 0.1
    meter, empty = SubjectMeter("right"), np.full((48, 64, 64, 3), 200, np.uint8)
    for _ in range(2):
        meter.push(empty, find_object(empty))
    assert meter.value() is None
