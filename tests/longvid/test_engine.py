"""The engine, end to end on a tiny random model: frames, shots, events, interruption, failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longvid.engine import Engine
from longvid.errors import InputError, Interrupted, RuntimeFailure
from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started
from longvid.notices import notices
from longvid.script import parse_script
from longvid.settings import load_settings
from longvid.sparsity.make import make_attention

FAST = ["sampler.steps=2"]
LONG = """
scenes:
  - {prompt: "a red circle moving left", for: 70f}
  - {prompt: "a blue square moving left", for: 40f, transition: {kind: blend, over: 12f}}
  - {prompt: "a red square", for: 9f, transition: cut}
"""


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, overrides=FAST)


def frames_of(engine: Engine, text: str) -> np.ndarray:
    return np.concatenate(list(engine.stream(parse_script(text, "story.yaml"))))


def test_a_film_has_exactly_the_frames_that_its_storyboard_asks_for(engine: Engine) -> None:
    pieces = list(engine.stream(parse_script(LONG, "story.yaml")))
    assert len(pieces) == len(engine.plan(parse_script(LONG, "story.yaml")).chunks) > 3
    assert sum(map(len, pieces)) == 119
    assert all(piece.dtype == np.uint8 and piece.shape[1:] == (48, 32, 3) for piece in pieces)


def test_the_same_storyboard_gives_the_same_film_and_another_seed_another(engine: Engine) -> None:
    first = frames_of(engine, LONG)
    assert (first == frames_of(engine, LONG)).all()
    assert (first != frames_of(engine, "seed: 1" + LONG)).any()


def test_nothing_of_a_later_shot_reaches_back_over_the_cut(engine: Engine) -> None:
    first, second = "  - {prompt: 'a blue circle', for: 33f}\n", "  - {prompt: 'a red square', for: 9f}\n"
    alone, both = (frames_of(engine, f"scenes:\n{scenes}") for scenes in (first, first + second))
    assert len(both) == 42 and (both[:33] == alone).all()


def test_a_film_of_one_chunk_is_the_same_in_the_queue_and_at_once(tiny_model: Path, engine: Engine) -> None:
    text = "scenes:\n  - {prompt: 'a red circle', for: 29f}\n"
    at_once = Engine.load(tiny_model, overrides=[*FAST, "schedule=sequential"])
    assert (frames_of(engine, text) == frames_of(at_once, text)).all()


def test_context_reaches_the_neighbours(tiny_model: Path, engine: Engine) -> None:
    text = "scenes:\n  - {prompt: 'a red circle', for: 61f}\n"
    without = Engine.load(tiny_model, overrides=[*FAST, "queue.context_latents=0", "queue.chunk_latents=8"])
    assert engine.plan(parse_script(text, "s")).chunks[0].num_latents == 8
    assert (frames_of(engine, text)[:29] != frames_of(without, text)[:29]).any()


def test_events_tell_the_whole_course(engine: Engine, tmp_path: Path) -> None:
    events: list[Event] = []
    film = engine.render(parse_script(LONG, "story.yaml"), tmp_path / "film.mp4", events.append)
    (started,) = [e for e in events if isinstance(e, Started)]
    rounds = [e for e in events if isinstance(e, RoundDone)]
    chunks = [e for e in events if isinstance(e, ChunkDone)]
    assert started.num_frames == 119 and started.num_chunks == len(chunks)
    assert [e.round for e in rounds] == list(range(1, started.num_rounds + 1))
    assert rounds[-1].units_done == rounds[-1].num_units == 2 * len(chunks) == sum(e.units for e in rounds)
    assert chunks[-1].frames_done == 119
    assert isinstance(events[-1], FilmDone) and events[-1].path == film
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 119


def test_words_that_the_model_does_not_know_are_named_with_the_nearest(engine: Engine) -> None:
    events: list[Event] = []
    story = parse_script("scenes:\n  - {prompt: 'a red circl', for: 5f}\n", "story.yaml")
    list(engine.stream(story, events.append))
    (notice,) = [e for e in events if isinstance(e, Notice)]
    assert "line 2" in notice.text and "'circl'" in notice.text and "'circle'" in notice.text


def test_an_interrupted_render_leaves_a_film_that_plays(engine: Engine, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, ChunkDone) and event.chunk == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"film\.partial\.mp4"):
        engine.render(parse_script(LONG, "story.yaml"), tmp_path / "film.mp4", stop)
    assert not (tmp_path / "film.mp4").exists()
    with av.open(str(tmp_path / "film.partial.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 29


def test_latents_that_are_not_finite_stop_the_render_and_name_the_place(tiny_model: Path) -> None:
    broken = Engine.load(tiny_model, overrides=FAST)
    with torch.no_grad():
        broken._stage.dit.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeFailure, match=r"chunk 0 .* step 1 of 2"):
        frames_of(broken, LONG)


def test_guidance_of_one_needs_no_negative_and_more_does_something(tiny_model: Path, engine: Engine) -> None:
    guided = Engine.load(tiny_model, overrides=[*FAST, "sampler.guidance=3"])
    text = "negative: a blue square\nscenes:\n  - {prompt: 'a red circle', for: 61f}\n"
    assert (frames_of(guided, text) != frames_of(engine, text)).any()


def test_a_loaded_pipeline_renders_as_its_directory_does(tiny_model: Path, engine: Engine) -> None:
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_model)
    own = Engine.load(pipeline, overrides=FAST)
    assert own.facts.fps == 8 and own.facts.per_token_timesteps
    assert (frames_of(own, LONG) == frames_of(engine, LONG)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="CUDA"):
        Engine.load(tiny_model, overrides=["runtime.device=cuda"])


def test_one_film_at_a_time_so_that_none_takes_up_what_is_another_s(engine: Engine) -> None:
    one, other = parse_script(LONG, "story.yaml"), parse_script(LONG.replace("red", "blue"), "other.yaml")
    expected = frames_of(engine, LONG)
    first = engine.stream(one)
    pieces = [next(first)]
    with pytest.raises(InputError, match="at work on another film"):
        next(engine.stream(other))
    assert (np.concatenate([*pieces, *first]) == expected).all(), "the first goes on as though nobody had come"
    second = engine.stream(other)
    next(second)
    second.close()
    assert (frames_of(engine, LONG) == expected).all()


def test_a_model_that_is_none_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="a int is no name, no path, and no pipeline"):
        Engine.load(5)


@pytest.mark.parametrize("names", [[], ["a.mp4"], ["a.mp4", "a.mp4"]])
def test_every_storyboard_needs_a_film_of_its_own(engine: Engine, tmp_path: Path, names: list[str]) -> None:
    stories = [parse_script(LONG, "story.yaml")] * 2
    with pytest.raises(InputError, match="each of the 2 storyboards needs a film of its own"):
        engine.render_films(stories, [tmp_path / name for name in names])
    assert not list(tmp_path.iterdir())


def test_attention_that_stays_dense_is_told_of_models_with_any_vocabulary(engine: Engine) -> None:
    settings = load_settings(None, [*FAST, "attention.policy=adaspa"])
    plan, sparse = engine.plan(parse_script(LONG, "story.yaml")), make_attention(settings, engine.facts, None)
    for vocabulary in (engine.facts.vocabulary, None):
        facts = replace(engine.facts, vocabulary=vocabulary)
        told = list(notices(plan, settings, facts, sparse, None, torch.device("cpu")))
        assert any("it stays dense" in text for text in told)


def test_negatives_that_nobody_follows_are_told(engine: Engine) -> None:
    plan = engine.plan(parse_script(f"negative: a blue square{LONG}", "story.yaml"))
    for guidance, count in ((1, 1), (3, 0)):
        settings = load_settings(None, [f"sampler.guidance={guidance}"])
        told = list(notices(plan, settings, engine.facts, None, None, torch.device("cpu")))
        assert sum("negative prompts do nothing" in text for text in told) == count
