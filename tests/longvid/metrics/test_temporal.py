"""Flicker, seams and drift of films whose values are known."""

from __future__ import annotations

import numpy as np
import pytest

from longvid.metrics.temporal import Drift, Flicker, Moment, Seams, feed


def moments(images, section_of=lambda index: 0, first=0):
    return [Moment(first + i, section_of(first + i), np.asarray(image, np.uint8)) for i, image in enumerate(images)]


def measured(meter, stream):
    feed(stream, [meter])
    return meter.value()


def flat(levels, shape=(8, 8, 3)):
    return [np.full(shape, level, np.uint8) for level in levels]


def noise(count, amplitude=3, seed=0):
    """Independent noise: the same mean change between any two frames."""
    return np.random.default_rng(seed).integers(100, 100 + amplitude, (count, 64, 64, 3)).astype(np.uint8)


def test_flicker_is_vbenchs_formula_within_sections():
    assert measured(Flicker(), moments(flat([10, 13, 13, 8]))) == pytest.approx((255 - (3 + 0 + 5) / 3) / 255)
    cut_at_2 = moments(flat([10, 13, 200, 195]), lambda index: int(index >= 2))
    assert measured(Flicker(), cut_at_2) == pytest.approx((255 - 4) / 255)
    skipped = [m for m in moments(flat([10, 13, 200, 201, 202])) if m.index != 2]
    assert measured(Flicker(), skipped) == pytest.approx((255 - 2) / 255)
    assert measured(Flicker(), moments(flat([7]))) is None


def test_seams_are_one_where_borders_are_like_all_else():
    seams = measured(Seams(range(8, 96, 8)), moments(noise(96)))
    assert seams["ratio"] == pytest.approx(1, abs=0.02)
    assert seams["second_ratio"] == pytest.approx(1, abs=0.02)


def test_a_jump_at_borders_is_the_mean_change_there_over_the_median_elsewhere():
    levels = np.cumsum([1 + 3 * (i in (10, 20)) + (i == 14) for i in range(30)])
    seams = measured(Seams([10, 20]), moments(flat(levels)))
    assert seams["ratio"] == pytest.approx(4.0)
    jump_elsewhere = measured(Seams([5, 15]), moments(flat(levels)))
    assert jump_elsewhere["ratio"] == pytest.approx(1.0)


def test_a_kink_in_smooth_motion_shows_in_the_second_difference_alone():
    steps = np.where(np.arange(40) < 20, 2, -2)
    levels = 100 + np.cumsum(steps)
    seams = measured(Seams([20]), moments(flat(levels)))
    assert seams["ratio"] == pytest.approx(1.0)
    # The kink lies between the two changes around frame 19; a border at 19 is centred on it.
    assert measured(Seams([19]), moments(flat(levels)))["second_ratio"] == pytest.approx(4 / 0.25)


def test_bends_beside_a_border_are_not_elsewhere():
    """Jumps every third frame bend the film at their border and before it; only the bend after it is elsewhere."""
    levels = np.cumsum([1 + 3 * (i % 3 == 0) for i in range(60)])
    seams = measured(Seams(range(3, 60, 3)), moments(flat(levels)))
    assert seams["second_ratio"] == pytest.approx(3 / 0.25)


def test_sections_of_different_pace_do_not_make_seams_and_cuts_are_none():
    fast, slow = noise(60, 30), noise(60, 3, seed=1)
    film = moments(np.concatenate([slow, fast + 90]), lambda index: int(index >= 60))
    assert measured(Seams([20, 40, 60, 80, 100]), film)["ratio"] == pytest.approx(1, abs=0.02)


def test_a_pop_in_a_still_scene_is_a_seam_and_perfect_stillness_is_not():
    still = measured(Seams([10]), moments(flat([50] * 20)))
    assert still["ratio"] == 0
    pop = measured(Seams([10]), moments(flat([50] * 10 + [53] * 10)))
    assert pop["ratio"] == pytest.approx(12)


def test_no_borders_no_seams():
    assert measured(Seams([]), moments(noise(10))) is None


def test_drift_finds_the_slope_a_minute():
    fps, count = 10, 300
    base = np.array([60.0, 120.0, 180.0])
    levels = base + np.outer(np.arange(count) / (60 * fps), [40, 0, -30])
    film = moments(np.rint(levels)[:, None, None] * np.ones((1, 16, 16, 1)))
    drift = measured(Drift(fps), film)
    assert drift["rgb_per_minute"] == pytest.approx([40, 0, -30], abs=0.5)
    assert drift["rgb_quarters"] == pytest.approx([15, 0, 11.25], abs=0.5)
    assert drift["std_per_minute"] == pytest.approx(0, abs=1e-3)


def test_loss_of_contrast_and_sharpness_is_drift():
    pattern = np.random.default_rng(0).normal(0, 30, (32, 32, 1))
    fading = [np.clip(128 + pattern * (1 - t / 200), 0, 255).repeat(3, -1) for t in range(100)]
    drift = measured(Drift(50), moments(fading))
    assert drift["std_per_minute"] == pytest.approx(-30 / 200 * 50 * 60, rel=0.05)
    assert drift["laplacian_per_minute"] < -1e4
    assert drift["std_quarters"] == pytest.approx(30 * 75 / 200, rel=0.05)


def test_scenes_of_different_colours_do_not_drift():
    film = moments(flat([40] * 50 + [200] * 50), lambda index: int(index >= 50))
    drift = measured(Drift(16), film)
    assert drift["rgb_per_minute"] == pytest.approx([0, 0, 0])
    assert drift["rgb_quarters"] == pytest.approx([0, 0, 0])
    assert measured(Drift(16), moments(flat([1, 2, 3]))) is None


def test_meters_take_a_stream_of_any_length():
    """Frames come from a generator and none is kept: each is overwritten as soon as the next is drawn."""

    def stream():
        image = np.zeros((4, 4, 3), np.uint8)
        for index in range(2000):
            yield Moment(index, 0, np.full_like(image, index % 5))

    feed(stream(), [flicker := Flicker(), drift := Drift(16), seams := Seams(range(0, 2000, 24))])
    assert flicker.value() == pytest.approx((255 - 1.6) / 255, abs=1e-4)
    assert drift.value()["rgb_per_minute"] == pytest.approx([0, 0, 0], abs=1e-2)
    assert seams.value() is not None
