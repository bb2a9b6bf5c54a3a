"""Films that go on: old frames keep their bytes, what is added knows how they ended, and a kill costs nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from longvid.ending import Ending
from longvid.engine import Engine
from longvid.errors import InputError, Interrupted
from longvid.events import ChunkDone, Event, Notice, RoundDone
from longvid.manifest import working_folder
from longvid.script import Duration, Scene, Transition, parse_script

SETTINGS = [
    *("sampler.steps=3", "queue.chunk_latents=4", "runtime.threads=1", "runtime.checkpoint_s=0"),
    *("output.segment_s=1", "output.keep_state=true"),
]
STORY = """
style: over a blue background
scenes:
  - {prompt: "a red circle", for: 5f}
  - {prompt: "a blue square", for: 55f, transition: cut}
"""
BLEND = Scene("a blue square moving left", Duration(25, "f"), Transition("blend", Duration(8, "f")))
CUT = Scene("a red circle", Duration(11, "f"))


def frames_of(film: Path) -> NDArray[np.uint8]:
    with av.open(str(film)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, overrides=SETTINGS)


@pytest.fixture(scope="module")
def film(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames: the last latent of the second shot holds two more."""
    return engine.render(parse_script(STORY, "story.yaml"), tmp_path_factory.mktemp("films") / "film.mp4")


@pytest.fixture(scope="module")
def longer(engine: Engine, film: Path) -> Path:
    """The film twice longer, as another film."""
    once = engine.extend(film, [BLEND], film.with_name("once.mp4"))
    return engine.extend(once, [BLEND, CUT], film.with_name("twice.mp4"))


def test_old_frames_keep_their_bytes_and_the_film_becomes_longer(film: Path, longer: Path) -> None:
    once = film.with_name("once.mp4")
    old, more, most = (frames_of(path) for path in (film, once, longer))
    assert [len(frames) for frames in (old, more, most)] == [60, 85, 121]
    assert (more[:60] == old).all() and (most[:85] == more).all()
    for shorter, path in ((film, once), (once, longer)):
        for segment in working_folder(shorter).glob("seg_*.ts"):
            assert segment.read_bytes() == (working_folder(path) / segment.name).read_bytes()
    ending = Ending.read(longer)
    assert (ending.frames, ending.ends) == (121, [60, 85])
    assert [scene.prompt for scene in ending.script().scenes][2] == "a blue square moving left over a blue background"


def test_what_is_added_goes_on_from_the_last_latents(engine: Engine, film: Path, longer: Path) -> None:
    """The frames that the last latent held beyond the end come first, and another past gives another scene."""
    ending = Ending.read(film)
    whole = parse_script(STORY.replace("for: 55f", "for: 57f"), "story.yaml")
    two_more = np.concatenate(list(engine.stream(whole)))[60:]
    alone = Scene(ending.script().scenes[-1].prompt, Duration(25, "f"))
    fresh = frames_of(engine.extend(film, [alone], film.with_name("fresh.mp4")))

    def distance(film: NDArray[np.uint8]) -> float:
        return float(abs(film[60:62].astype(int) - two_more).mean())

    assert 2 * distance(frames_of(longer)) < distance(fresh)  # but for what the codec loses


@pytest.mark.parametrize("left", ["recompute", "cached"])
def test_an_extension_that_is_killed_is_resumed_to_the_same_bytes(
    tiny_model: Path, engine: Engine, film: Path, left: str, tmp_path: Path
) -> None:
    """In the film's own place. What another run left behind is in nobody's way."""
    if left == "cached":
        engine = Engine.load(tiny_model, overrides=[*SETTINGS, "queue.left=cached"])
        film = engine.render(parse_script(STORY, "story.yaml"), tmp_path / "first.mp4")
    own = tmp_path / "own.mp4"
    shutil.copy(film, own)
    shutil.copytree(working_folder(film), working_folder(own))
    whole = engine.extend(film, [BLEND], tmp_path / "whole.mp4").read_bytes()
    saw: list[Event] = []

    def stop(event: Event) -> None:
        saw.append(event)
        if isinstance(event, ChunkDone):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="--resume goes on"):
        engine.extend(own, [BLEND], on_event=stop)
    assert own.read_bytes() == film.read_bytes()
    rounds = [event for event in saw if isinstance(event, RoundDone)]
    assert [event.round for event in rounds] == list(range(1, len(rounds) + 1))
    assert engine.extend(own, [BLEND], resume=True).read_bytes() == whole
    assert Ending.read(own).frames == 85
    with pytest.raises(InputError, match="is complete"):
        engine.render(parse_script(STORY, "story.yaml"), own, resume=True)


def test_films_that_are_made_together_end_as_they_do_alone(tiny_model: Path, film: Path, tmp_path: Path) -> None:
    """Side by side, whichever ends first; so they go on as they would."""
    engine = Engine.load(tiny_model, overrides=[*SETTINGS, "mesh.films=2"])
    stories = [parse_script(STORY.replace("for: 55f", last), "story.yaml") for last in ("for: 70f", "for: 55f")]
    paths = engine.render_films(stories, [tmp_path / "other.mp4", tmp_path / "same.mp4"])
    assert paths[1].read_bytes() == film.read_bytes()
    kept = [working_folder(path) / "state" / Ending.read(path).tensors for path in (film, *paths)]
    assert kept[0].read_bytes() == kept[2].read_bytes() != kept[1].read_bytes()
    said: list[Event] = []
    assert engine.render_films(stories, paths, said.append, resume=True) == paths
    assert said == [Notice(f"{path} is complete: left as it is") for path in paths]


def test_what_has_no_queue_cannot_go_on_or_change(tiny_model: Path, film: Path, tmp_path: Path) -> None:
    engine = Engine.load(tiny_model, overrides=[*SETTINGS, "schedule=chunks"])
    with pytest.raises(InputError, match="cannot go on: only the queue"):
        engine.extend(film, [BLEND], tmp_path / "longer.mp4")
    with pytest.raises(InputError, match="none can take another prompt"):
        engine.stream(parse_script(STORY, "story.yaml")).prompt("a red circle")


def test_a_film_whose_state_is_gone_or_another_models_is_refused(
    tiny_model: Path, engine: Engine, film: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"state was not kept .*--keep-state"):
        engine.extend(tmp_path / "film.mp4", [BLEND])
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(InputError, match=r"cannot go on.*\n.*the model's files changed \(transformer/config.json\)"):
        Engine.load(film=film, overrides=[f"model.path={other}"]).extend(film, [BLEND], tmp_path / "longer.mp4")
    with pytest.raises(InputError, match=r"sampler.steps: 3 then, 4 now"):
        Engine.load(film=film, overrides=["sampler.steps=4"]).extend(film, [BLEND], tmp_path / "longer.mp4")
    share = Scene("a red circle", Duration(25, "f"), Transition("share"))
    with pytest.raises(InputError, match="the scene before is finished, and its K/V are gone"):
        engine.extend(film, [share], tmp_path / "longer.mp4")
    with pytest.raises(InputError, match="the blend over 8f is longer than its scene of 5f"):
        engine.extend(film, [Scene("a", Duration(5, "f"), BLEND.transition)], tmp_path / "longer.mp4")
    assert not (tmp_path / "longer.mp4.longvid").exists()
    lost = working_folder(film).parent / "lost.mp4"
    shutil.copytree(working_folder(film), working_folder(lost))
    (working_folder(lost) / "state" / Ending.read(film).tensors).unlink()
    with pytest.raises(InputError, match="is missing or damaged"):
        engine.extend(lost, [BLEND])


def test_the_command_line_keeps_what_it_needs_to_add_scenes(tiny_model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from longvid.cli import app

    film, story, runner = str(tmp_path / "film.mp4"), tmp_path / "story.yaml", CliRunner()
    story.write_text("scenes: [{prompt: a red circle, for: 20f}]")
    scene = ["--scene", "a blue square", "--for", "9f", "--over", "4f"]
    options = ["--model", str(tiny_model), "--set", "sampler.steps=1"]
    assert runner.invoke(app, ["render", str(story), "-o", film, *options]).exit_code == 0
    done = runner.invoke(app, ["extend", film, *scene])
    assert done.exit_code == 2 and "--keep-state" in done.output
    assert runner.invoke(app, ["render", str(story), "-o", film, *options, "--keep-state"]).exit_code == 0
    for wrong in (["--for", "9"], ["--scene", " "], ["--transition", "cut"]):
        assert runner.invoke(app, ["extend", film, *scene, *wrong]).exit_code == 2
    done = runner.invoke(app, ["extend", film, *scene])
    assert done.exit_code == 0, done.output
    assert len(frames_of(Path(film))) == 29 == Ending.read(Path(film)).frames
