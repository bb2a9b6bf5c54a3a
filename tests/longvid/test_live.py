"""Prompts that change while a film streams: which chunks take them, from which frame on; and any thread may ask."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.events import Event, Notice, PromptChanged
from longvid.geometry import LatentGrid
from longvid.plan import ModelFacts, Plan, PromptBlend, change_prompt, make_plan
from longvid.script import Duration, Scene, Script, Transition, parse_script
from longvid.settings import load_settings

SETTINGS = ["sampler.steps=4", "queue.chunk_latents=2", "queue.context_latents=1"]
STORY = """
seed: 1
scenes:
  - {prompt: "a red circle", for: 60f}
  - {prompt: "a blue square", for: 20f, transition: {kind: blend, over: 8f}}
"""
NEW = "a blue circle moving left"


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, overrides=SETTINGS)


@pytest.fixture(scope="module")
def plan(engine: Engine) -> Plan:
    return engine.plan(parse_script(STORY, "story.yaml"))


def frames_of(engine: Engine, plan: Plan) -> NDArray[np.uint8]:
    return np.concatenate([engine.decode(plan, finished) for finished in engine.denoise(plan)])


def streamed(engine: Engine, wishes: dict[int, str], early_steps: int = 0) -> tuple[NDArray[np.uint8], list[Event]]:
    """A film for which prompts are asked from another thread, each after so many pieces."""
    events: list[Event] = []
    stream = engine.stream(parse_script(STORY, "story.yaml"), events.append, early_steps=early_steps)
    pieces = []
    for count in range(100):
        if count in wishes:
            asking = threading.Thread(target=stream.prompt, args=(wishes[count],))
            asking.start()
            asking.join()
        if (piece := next(stream, None)) is None:
            break
        pieces.append(piece)
    return np.concatenate(pieces), [event for event in events if isinstance(event, PromptChanged | Notice)]


def test_chunks_that_have_not_begun_take_a_new_prompt_as_though_it_had_been_planned(engine: Engine, plan: Plan) -> None:
    frames, events = streamed(engine, {2: NEW})
    [event] = [event for event in events if isinstance(event, PromptChanged)]
    assert event == PromptChanged(NEW, chunk=6, first_frame=1 + 4 * (plan.chunks[5].start - 1))
    assert (frames == frames_of(engine, change_prompt(plan, 5, NEW, ""))).all()
    before = frames_of(engine, plan)
    handed_out = 1 + 4 * (plan.chunks[2].start - 1)  # those in flight see their right neighbours
    assert (frames[:handed_out] == before[:handed_out]).all()
    assert (frames[event.first_frame :] != before[event.first_frame :]).any()


def test_chunks_at_early_steps_may_take_it_too(engine: Engine, plan: Plan) -> None:
    late, _ = streamed(engine, {2: NEW})
    frames, events = streamed(engine, {2: NEW}, early_steps=2)
    [event] = [event for event in events if isinstance(event, PromptChanged)]
    assert event.chunk == 4
    assert (frames != late).any() and (frames != frames_of(engine, change_prompt(plan, 3, NEW, ""))).any()


def test_a_prompt_may_change_again_or_be_overtaken_and_come_too_late(engine: Engine) -> None:
    frames, events = streamed(engine, {0: "a red square", 3: NEW, 9: "too late"})
    changed = [event for event in events if isinstance(event, PromptChanged)]
    assert [event.prompt for event in changed] == ["a red square", NEW]
    assert changed[0].first_frame < changed[1].first_frame < len(frames) == 80
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "too late for 'too late': the last chunk of the film is under way"
    ]
    with pytest.raises(InputError, match="must say something"):
        engine.stream(parse_script(STORY, "story.yaml")).prompt(" ")
    with pytest.raises(InputError, match="early_steps must be 0 to 3, not 4"):
        engine.stream(parse_script(STORY, "story.yaml"), early_steps=4)


FACTS = ModelFacts("toy", "wan", LatentGrid(1), 2, 4, 24.0, 64, 64, True, 1024)


def own_prompts(plan: Plan) -> list[PromptBlend]:
    return [blend for chunk in plan.chunks for blend in chunk.prompts[chunk.num_left :]]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["cut", "blend", "share"])), min_size=1, max_size=4),
    st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b))),
    st.sampled_from("abz"),
    st.data(),
)
def test_a_scene_follows_another_prompt_from_a_chunk_on_to_its_end(scenes, sizes, new, data):
    script = Script(
        tuple(
            Scene(prompt, Duration(9, "f"), Transition(kind, Duration(3, "f")) if kind != "cut" and i else Transition())
            for i, (prompt, kind) in enumerate(scenes)
        )
    )
    overrides = [f"queue.chunk_latents={sizes[0]}", f"queue.context_latents={sizes[1]}"]
    plan = make_plan(script, load_settings(None, overrides), FACTS)
    first = data.draw(st.integers(0, len(plan.chunks) - 1))
    after = change_prompt(plan, first, new, "")
    assert after.prompts[: len(plan.prompts)] == plan.prompts
    at = sum(chunk.num_latents for chunk in plan.chunks[:first])
    old, now = own_prompts(plan), own_prompts(after)
    assert now[:at] == old[:at]
    texts = [(after.prompts[blend.a], after.prompts[blend.b], blend.weight) for blend in now]
    replaced, had = plan.prompts[old[at].b], [(plan.prompts[blend.a], plan.prompts[blend.b]) for blend in old]
    assert texts[at][1] == new and texts[at][2] == old[at].weight
    scene = at // 9  # a scene is nine latents
    for f in range(at, len(now)):
        if f // 9 == scene:
            assert texts[f][:2] == tuple(new if text == replaced else text for text in had[f])
        elif replaced not in had[f]:
            assert texts[f][:2] == had[f]
    begin = 0
    for chunk in after.chunks:  # as left context latents have the prompts that they have as own ones
        assert list(chunk.prompts[: chunk.num_left]) == now[begin - chunk.num_left : begin]
        begin += chunk.num_latents


@pytest.mark.parametrize(
    ("prompt", "negative", "message"),
    [
        ("a red \a circle", None, "a prompt: control character '\\\\x07'"),
        ("a circle " * 300, None, "a prompt: must hold at most 2000 characters, not 2699"),
        (5, None, "a prompt must be text, not 5"),
        ("a circle", 5, "a negative must be text, not 5"),
        (" \n", None, "a prompt must say something"),
    ],
)
def test_what_no_storyboard_could_hold_is_no_live_prompt(
    engine: Engine, prompt: str, negative: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(parse_script(STORY, "story.yaml")).prompt(prompt, negative)


def test_words_of_a_live_prompt_that_the_model_does_not_know_are_told(engine: Engine) -> None:
    _, events = streamed(engine, {0: "a red zebra"})
    changed = next(i for i, event in enumerate(events) if isinstance(event, PromptChanged))
    assert events[changed + 1] == Notice("the model does not know 'zebra'")
