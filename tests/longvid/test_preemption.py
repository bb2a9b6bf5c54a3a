"""A render that is asked to make room saves its state, ends, and goes on to the same film."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longvid.engine import Engine
from longvid.errors import Preempted
from longvid.events import Event, RoundDone
from longvid.preemption import Preemption

SCENES = 'scenes: [{prompt: "a red circle moving left", for: 80f}]'


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    overrides = ["runtime.threads=1", "sampler.steps=2", "queue.chunk_latents=2", "runtime.checkpoint_s=1000"]
    return Engine.load(tiny_model, overrides=overrides)


@pytest.fixture
def long_story(tmp_path: Path) -> Path:
    path = tmp_path / "long.yaml"
    path.write_text(SCENES)
    return path


def stopped(
    engine: Engine, story: Path, film: Path, on_round: Callable[[int, Preemption], None], *, resume: bool = False
) -> str:
    """What a render says that was asked to end by `on_round`."""
    preemption = Preemption()

    def on_event(event: Event) -> None:
        if isinstance(event, RoundDone):
            on_round(event.round, preemption)

    with pytest.raises(Preempted) as error:
        engine.render(story, film, on_event, preemption=preemption, resume=resume)
    return str(error.value)


def ask_in_round_2(film: Path) -> Callable[[int, Preemption], None]:
    """Asks, and gives the disk the time that it takes before the film is complete."""
    manifest = film.with_name(f"{film.name}.longvid") / "state/manifest.json"

    def on_round(number: int, preemption: Preemption) -> None:
        if number == 2:
            preemption.ask()
        until = time.monotonic() + 120
        while number == 6 and not manifest.exists():
            assert time.monotonic() < until, "nothing was saved"
            time.sleep(0.01)

    return on_round


def at_once(number: int, preemption: Preemption) -> None:
    """What the timer does to a render that waits too long for its next checkpoint."""
    preemption.ask()
    raise KeyboardInterrupt


def test_it_is_saved_and_goes_on_to_the_same_film(engine: Engine, long_story: Path, tmp_path: Path) -> None:
    expected, film = engine.render(long_story, tmp_path / "expected.mp4").read_bytes(), tmp_path / "film.mp4"
    said = stopped(engine, long_story, film, ask_in_round_2(film))
    assert re.fullmatch(r"stopped, and saved after round \d+; the same command with --resume goes on", said)
    assert not film.exists()
    assert engine.render(long_story, film, resume=True).read_bytes() == expected


def test_without_time_to_save_it_says_what_there_is(engine: Engine, long_story: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    said = stopped(engine, long_story, film, at_once)
    assert said == "stopped before the first checkpoint; the same command begins anew"
    assert (film.with_name("film.mp4.longvid") / "film.m3u8").read_text().endswith("#EXT-X-ENDLIST\n")
    saved = stopped(engine, long_story, film, ask_in_round_2(film))
    [done] = re.findall(r"round \d+", saved)
    assert stopped(engine, long_story, film, at_once, resume=True) == (
        f"stopped; there was no time to save more than the checkpoint after {done}: --resume goes on from there"
    )
