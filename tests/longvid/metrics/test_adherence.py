"""What a drawn clip shows is read back, clean, noisy, blurred, at any size; what it does not show is not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from longvid.metrics.adherence import expected, read_clip, score
from longvid.training import world


def blurred(frames, passes=1):
    """A 3 x 3 binomial blur, on the torus."""
    out = frames.astype(np.float32)
    for axis in [1, 2] * passes:
        out = (np.roll(out, 1, axis) + 2 * out + np.roll(out, -1, axis)) / 4
    return out


def as_frames(values):
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def draw(look, num_frames=33, side=64, seed=0):
    return world.make_clip(np.random.default_rng(seed), num_frames, side, looks=[look], change_share=0).frames


def misread(clips):
    misses = Counter()
    for frames, look in clips:
        reading = read_clip(frames)
        misses.update(name for name, value in look.attributes().items() if getattr(reading, name) != value)
        misses["count"] += reading.count != 1
        assert set(reading.shares) == set(world.ATTRIBUTES)
        assert all(0 <= share <= 1 for share in reading.shares.values())
    return +misses


@pytest.mark.parametrize("damage", ["clean", "noise", "blur", "noise and blur"])
def test_drawn_clips_are_read_right(damage):
    """40 clips each, and none may be misread: 160 clips, so at least 99 % are right for every attribute."""
    rng = np.random.default_rng(11)

    def clip():
        drawn = world.make_clip(rng, int(rng.integers(33, 50)), 64, change_share=0)
        values = blurred(drawn.frames) if "blur" in damage else drawn.frames
        return as_frames(values + rng.normal(0, 4 if "noise" in damage else 0, values.shape)), drawn.looks[0]

    assert not misread(clip() for _ in range(40))


@pytest.mark.parametrize(("side", "num_frames"), [(32, 33), (96, 33), (144, 17)])
def test_other_sizes_are_read_right(side, num_frames):
    rng = np.random.default_rng(side)
    clips = [world.make_clip(rng, num_frames, side, change_share=0) for _ in range(12)]
    assert not misread((clip.frames, clip.looks[0]) for clip in clips)


def test_upscaled_frames_read_like_the_originals():
    rng = np.random.default_rng(3)
    frames = world.make_clip(rng, 17, 64, change_share=0).frames
    assert read_clip(frames.repeat(4, 1).repeat(4, 2)) == read_clip(frames)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_an_object_on_the_corner_of_the_torus_is_whole(shape):
    look = world.Look("white", "blue", shape, "large", "still", shaded=True)
    corner = world.Track((0.01, 0.99), np.zeros((9, 2), np.float32))
    reading = read_clip(world.draw([look], np.ones((9, 1), np.float32), corner, 64))
    assert (reading.shape, reading.size, reading.count, reading.motion) == (shape, "large", 1, "still")


def test_a_broken_object_is_counted():
    frames = draw(world.Look("red", "white", "circle", "small", "still"))
    assert read_clip(frames).count == 1
    assert read_clip(np.minimum(frames, np.roll(frames, 32, 2))).count == 2


def test_an_empty_scene_shows_a_background_and_nothing_else():
    rng = np.random.default_rng(0)
    empty = as_frames(np.array(world.PALETTE["purple"]) + rng.normal(0, 4, (20, 64, 64, 3)))
    reading = read_clip(empty)
    assert (reading.background, reading.colour, reading.shape, reading.size, reading.motion) == (
        "purple",
        None,
        None,
        None,
        None,
    )
    assert reading.count == 0


def test_shares_say_how_many_frames_agree():
    red = draw(world.Look("red", "white", "circle", "small", "still"), 30)
    green = draw(world.Look("green", "white", "circle", "small", "still"), 10)
    reading = read_clip(np.concatenate([red, green]))
    assert reading.colour == "red"
    assert reading.shares["colour"] == pytest.approx(0.75)


def test_heavy_blur_leaves_shapes_and_makes_none_of_circles():
    rng = np.random.default_rng(5)
    for shape in world.SHAPES:
        for size in world.SIZES:
            frames = draw(world.Look("yellow", "blue", shape, size, "right"), 17)
            reading = read_clip(as_frames(blurred(frames, 4) + rng.normal(0, 6, frames.shape)))
            assert (reading.shape, reading.size) == (shape, size)


def test_a_scribble_has_no_shape():
    frames = np.full((20, 64, 64, 3), 240, np.uint8)
    frames[:, 30:33, 8:56] = 20
    frames[:, 8:56, 30:33] = 20
    assert read_clip(frames).shape is None


def test_only_what_the_prompt_names_is_scored():
    reading = read_clip(draw(world.Look("red", "white", "ring", "large", "up")))
    assert score(reading, expected("a red ring")) == {"colour": True, "shape": True, "ok": True}
    wanted = expected("a large red ring moving down, over a white background")
    assert wanted == {"colour": "red", "background": "white", "shape": "ring", "size": "large", "motion": "down"}
    assert score(reading, wanted) == {
        "colour": True,
        "background": True,
        "shape": True,
        "size": True,
        "motion": False,
        "ok": False,
    }
