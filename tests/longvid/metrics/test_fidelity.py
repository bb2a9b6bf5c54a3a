"""PSNR and SSIM against their formulas, written out."""

from __future__ import annotations

import numpy as np
import pytest

from longvid.metrics.fidelity import IDENTICAL_DB, Fidelity, ssim


def ssim_by_hand(x, y):
    """Equation 13 of Wang et al., window by window."""
    offsets = np.arange(11) - 5
    gauss = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    gauss /= gauss.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11].astype(float), y[i : i + 11, j : j + 11].astype(float)
            ma, mb = (gauss * a).sum(), (gauss * b).sum()
            va, vb = (gauss * (a - ma) ** 2).sum(), (gauss * (b - mb) ** 2).sum()
            cov = (gauss * (a - ma) * (b - mb)).sum()
            values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def image(seed, shape=(24, 30)):
    return np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)


def test_ssim_is_the_formula_of_the_paper():
    x = image(0)
    for y in (image(1), np.clip(x + image(2) / 4 - 32, 0, 255), 0.5 * x + 60, x):
        assert ssim(x, y) == pytest.approx(ssim_by_hand(x, y), abs=1e-5)
    assert ssim(x, x) == pytest.approx(1)


def test_ssim_of_large_images_is_taken_after_averaging():
    x, y = image(0, (24, 24)), image(1, (24, 24))
    assert ssim(np.tile(x, (22, 22)), np.tile(y, (22, 22))) == pytest.approx(
        ssim(
            np.tile(x, (22, 22)).reshape(264, 2, 264, 2).mean((1, 3)),
            np.tile(y, (22, 22)).reshape(264, 2, 264, 2).mean((1, 3)),
        ),
        abs=1e-6,
    )


def test_psnr_is_that_of_the_mean_error_over_all_frames():
    fidelity = Fidelity()
    black = np.zeros((16, 16, 3), np.uint8)
    fidelity.push(black, black)
    fidelity.push(black + 10, black)
    assert fidelity.num_frames == 2
    assert fidelity.psnr() == pytest.approx(10 * np.log10(255**2 / 50))


def test_identical_films_have_finite_best_values():
    fidelity = Fidelity()
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    for frame in frames:
        fidelity.push(frame, frame)
    assert fidelity.psnr() == IDENTICAL_DB
    assert fidelity.ssim() == pytest.approx(1)
