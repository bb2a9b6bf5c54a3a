"""Training can be stopped anywhere and goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longvid.errors import InputError
from longvid.training.loop import Ema, LoopSettings, Run, lr_share
from longvid.training.muon import Muon, orthogonalise

SETTINGS = LoopSettings(steps=12, lr=0.05, batch=4, warmup=2, save_every=5)


def train(folder: Path, settings: LoopSettings, *, stop_at: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 8, 3, padding=1), torch.nn.Conv3d(8, 2, 1))
    ema, muon = Ema(model, 0.9), Muon([p for p in model.parameters() if p.ndim > 1], lr=settings.lr)
    parts = {"model": model, "ema": ema, "muon": muon}
    run = Run(folder, settings)
    run.load(parts)
    for step in run.steps(parts, [muon]):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        (model(x) - x).square().mean().backward()
        muon.step()
        muon.zero_grad()
        ema.update(model, step)
    return model


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", SETTINGS, stop_at=7)
    resumed = train(tmp_path / "parts", SETTINGS)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_with_another_seed_is_refused(tmp_path: Path) -> None:
    train(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="seed"):
        train(tmp_path, replace(SETTINGS, seed=1))


def test_the_learning_rate_warms_up_and_decays() -> None:
    shares = [lr_share(step, replace(SETTINGS, steps=100, warmup=10)) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[40] == 1 and shares[99] < 0.06
    assert all(a >= b for a, b in pairwise(shares[70:]))


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_muon_orthogonalises(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.5 and values.max() < 1.4
    assert torch.linalg.svdvals(x / x.norm(dim=(1, 2), keepdim=True)).min() < 0.3
