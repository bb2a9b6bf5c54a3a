"""A router that is trained leaves out what costs more than it brings, and its table is rendered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longvid.cache.table import Row
from longvid.calibrate import write_preset
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.settings import Settings, load_settings
from longvid.training.harmonica import HarmonicaSettings, run_harmonica

STEPS = 6
STORY = """
scenes:
  - {prompt: "a red circle moving left", for: 9f}
  - {prompt: "a blue square", for: 9f, transition: cut}
"""


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    return path


@pytest.fixture
def settings(tiny_model: Path) -> Settings:
    return load_settings(overrides=[f"model.path={tiny_model}", f"sampler.steps={STEPS}", "queue.chunk_latents=2"])


def rows_of(story: Path, settings: Settings, how: HarmonicaSettings) -> tuple[Row, ...]:
    return run_harmonica(story, settings, how, lambda *_: None).rows


def test_a_price_leaves_modules_out_and_none_leaves_none(story: Path, settings: Settings, tmp_path: Path) -> None:
    how = HarmonicaSettings(runs=12, rate=0.5, price=1.0)
    told: list[tuple[int, float, float]] = []
    found = run_harmonica(story, settings, how, lambda *at: told.append(at))
    assert [run for run, *_ in told] == list(range(1, 13))
    assert not found.rows[0] and not found.rows[-1]
    assert found.share < 0.6 and found.share == pytest.approx(told[-1][2])
    assert rows_of(story, settings, how) == found.rows
    assert not any(rows_of(story, settings, replace(how, price=0.0, runs=2)))

    preset = tmp_path / "cache.yaml"
    write_preset(found, preset, STEPS)
    engine = Engine.load(settings.model.path, preset=str(preset), overrides=["queue.chunk_latents=2"])
    assert engine.cache is not None
    assert [engine.cache.at(step).modules for step in range(STEPS)] == list(found.rows)


def test_a_model_of_another_family_is_refused(story: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        facts = type("Facts", (), {"name": "other"})

    monkeypatch.setattr("longvid.training.harmonica.open_checkpoint", lambda path: Other())
    with pytest.raises(InputError, match="other: a router is trained for Wan's"):
        run_harmonica(story, settings, HarmonicaSettings(), lambda *_: None)
