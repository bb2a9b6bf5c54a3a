"""Several films in one pipe: each is what it is alone."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from longvid.cli import app
from longvid.errors import InputError, Preempted
from longvid.films import first_rounds, join, num_lanes
from longvid.geometry import LatentGrid
from longvid.options import film_paths
from longvid.parallel.actions import Finish, Forward, shift
from longvid.parallel.rehearsal import rehearse_schedule
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import last_round, make_schedule, num_finished, num_rounds, num_units
from longvid.parallel.topology import Topology
from longvid.parallel.verify import simulate
from longvid.plan import FilmSpan, ModelFacts, make_plan
from longvid.script import parse_script
from longvid.settings import load_settings
from longvid.together import FilmSavers

FACTS = ModelFacts(
    name="toy",
    family="wan",
    grid=LatentGrid(temporal=4, spatial=8, patch=(1, 2, 2)),
    latent_channels=4,
    num_layers=8,
    fps=16,
    width=64,
    height=64,
    per_token_timesteps=True,
    max_latents=1024,
)


def settings_of(*overrides):
    return load_settings(overrides=["queue.chunk_latents=3", "queue.context_latents=1", *overrides])


def plan_of(lengths, settings, seed=0, size=""):
    """A film of shots that are so many frames long; every second one has a scene that shares, where steps allow it."""
    scenes = "".join(f"  - {{prompt: shot {i} of {seed % 3}, for: {n}f}}\n" for i, n in enumerate(lengths))
    if seed % 2 and settings.sampler.steps >= 3:
        scenes += "  - {prompt: a, for: 40f}\n  - {prompt: b, for: 30f, transition: share}\n"
    return make_plan(parse_script(f"seed: {seed}\n{size}scenes:\n{scenes}", "story.yaml"), settings, FACTS)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=3)
SETTINGS = st.builds(
    lambda steps, gap, left, schedule: settings_of(
        f"sampler.steps={steps}", f"queue.gap={gap}", f"queue.left={left}", f"schedule={schedule}"
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from(["recompute", "cached"]),
    st.sampled_from(["queue", "sequential"]),
)


def joined(plans, done, lanes, settings):
    start, firsts = first_rounds(plans, done, lanes, QueueRules.of(settings))
    return join(plans, firsts), start


@given(st.lists(LENGTHS, min_size=1, max_size=5), SETTINGS, st.integers(1, 3))
def test_every_film_has_the_schedule_that_it_has_alone(films, settings, lanes):
    plans = [plan_of(lengths, settings, seed) for seed, lengths in enumerate(films)]
    plan, start = joined(plans, [-1] * len(plans), lanes, settings)
    actions = list(make_schedule(plan, settings))
    assert start == 0
    assert [action.round for action in actions] == sorted(action.round for action in actions)
    assert actions[-1].round + 1 == num_rounds(plan, settings)

    def film_of(action):
        match action:
            case Finish(latents=latents):
                return plan.film_of(plan.chunks[latents.chunk])
        for name in ("forward", "latents", "kv"):
            action = getattr(action, name, action)
        return plan.film_of(plan.chunks[action.chunk])

    for index, (alone, film) in enumerate(zip(plans, plan.films, strict=True)):
        own = [shift(a, -film.chunks.start, -film.first_round) for a in actions if film_of(a) == index]
        assert own == list(make_schedule(alone, settings))
        simulate(own, alone.chunks, settings.sampler.steps, QueueRules.of(settings))
        assert last_round(film, settings) == max(a.round for a in actions if film_of(a) == index)


@given(st.lists(LENGTHS, min_size=1, max_size=5), SETTINGS)
def test_chunks_of_a_joined_plan_are_those_of_its_films(films, settings):
    plans = [plan_of(lengths, settings, seed) for seed, lengths in enumerate(films)]
    plan, _ = joined(plans, [-1] * len(plans), 2, settings)
    assert plan.num_frames == sum(alone.num_frames for alone in plans)
    assert [chunk.index for chunk in plan.chunks] == list(range(len(plan.chunks)))
    for alone, film in zip(plans, plan.films, strict=True):
        for one, other in zip(alone.chunks, plan.chunks[film.chunks.start : film.chunks.stop], strict=True):
            texts = [
                [(p.prompts[b.a], p.prompts[b.b], b.weight) for b in c.prompts]
                for p, c in ((alone, one), (plan, other))
            ]
            assert texts[0] == texts[1]
            index, shot = one.index + film.chunks.start, one.shot + film.shots.start
            shares, end = other.shares, other.scene_end
            assert replace(one, index=index, shot=shot, prompts=other.prompts, shares=shares, scene_end=end) == other
            assert (shares is None) == (one.shares is None) and (end is None) == (one.scene_end is None)
            assert shares is None or shares - film.chunks.start == one.shares
            if end and one.scene_end:
                assert replace(end, last_reader=end.last_reader - film.chunks.start) == one.scene_end
            assert plan.shots[other.shot].first_chunk <= other.index


@given(st.lists(LENGTHS, min_size=1, max_size=6), SETTINGS, st.integers(1, 3), st.data())
def test_films_on_their_way_go_on_at_once_and_others_as_lanes_are_free(films, settings, lanes, data):
    plans = [plan_of(lengths, settings) for lengths in films]
    rules, steps = QueueRules.of(settings), settings.sampler.steps
    lasts = [rules.num_rounds(len(plan.chunks), steps) - 1 for plan in plans]
    done = [data.draw(st.integers(-1, last - 1)) if last else -1 for last in lasts]
    plan, start = joined(plans, done, lanes, settings)
    begun = sum(behind >= 0 for behind in done)
    entering = Counter()
    for alone, film, behind in zip(plans, plan.films, done, strict=True):
        if behind >= 0:
            assert film.first_round + behind + 1 == start
        else:
            assert film.first_round >= start
        gap = rules.gap
        entering.update(n for i in range(len(alone.chunks)) if (n := film.first_round + gap * i) >= start)
    assert max(entering.values(), default=0) <= max(lanes, begun)
    made = sum(num_finished(plan, settings, start - 1))
    finishes = [a for a in make_schedule(plan, settings) if isinstance(a, Finish)]
    assert made == sum(a.round < start for a in finishes)
    forwards = [a for a in make_schedule(plan, settings) if isinstance(a, Forward)]
    assert num_units(plan, settings, start - 1) == sum(a.round < start for a in forwards)


def test_films_fill_the_stages_that_one_cannot():
    """Four steps keep at most four chunks in flight: too few for eight stages."""
    settings = settings_of("sampler.steps=4")
    plans = [plan_of([300], settings, seed) for seed in range(6)]
    lanes = num_lanes("auto", 8, 4, QueueRules.of(settings))
    assert lanes == 3 and num_lanes("auto", 1, 4, QueueRules()) == 1 and num_lanes(2, 8, 4, QueueRules()) == 2

    def bubble(lanes):
        plan, _ = joined(plans, [-1] * 6, lanes, settings)
        cost = lambda rank, action: 1.0 * isinstance(action, Forward)  # noqa: E731
        return rehearse_schedule(lambda: make_schedule(plan, settings), Topology(stage=8), 4, cost).bubble

    assert bubble(1) > 0.5 and bubble(lanes) < 0.15


def test_other_sizes_are_refused():
    settings = settings_of()
    plans = [plan_of([20], settings), plan_of([20], settings, size="size: [32, 64]\n")]
    with pytest.raises(InputError, match="one size and frame rate, not 32 x 64 at 16 fps, 64 x 64 at 16 fps"):
        join(plans, [0, 0])


def test_films_are_named_after_their_storyboards():
    assert film_paths([Path("a/x.yaml")], Path("film.mp4")) == [Path("film.mp4")]
    assert film_paths([Path("a/x.yaml"), Path("y.yaml")], Path("out")) == [Path("out/x.mp4"), Path("out/y.mp4")]
    with pytest.raises(InputError, match="name a folder"):
        film_paths([Path("x.yaml"), Path("y.yaml")], Path("film.mp4"))
    with pytest.raises(InputError, match="rename one"):
        film_paths([Path("a/x.yaml"), Path("b/x.yaml")], Path("out"))


class Saver:
    """A film's, as far as `FilmSavers.is_due` looks."""

    def __init__(self, *, is_saved):
        self.is_saved_for_preemption, self.is_busy = is_saved, not is_saved

    def is_due(self):
        if self.is_saved_for_preemption:
            raise Preempted
        return False


def test_a_preemption_waits_for_every_film_to_be_saved():
    films = (FilmSpan(range(3), range(1)), FilmSpan(range(3, 6), range(1, 2), 1))
    two = FilmSavers(films, [9, 10], [Saver(is_saved=True), Saver(is_saved=False)])
    assert not two.is_due(4), "the second is still being written"
    with pytest.raises(Preempted):
        two.is_due(0)  # the second has not begun
    two.savers[1].is_saved_for_preemption = True
    with pytest.raises(Preempted):
        two.is_due(4)


def test_the_folder_of_several_films_is_made_once_nothing_is_wrong(tmp_path: Path, tiny_model: Path) -> None:
    stories = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for story in stories:
        story.write_text("scenes: [{prompt: a red circle, for: 1f}]")
    command = [*map(str, stories), "-o", str(tmp_path / "films"), "--model", str(tiny_model), "--set"]
    assert CliRunner().invoke(app, ["render", *command, "sampler.stops=1"]).exit_code == 2
    assert not (tmp_path / "films").exists()
    assert CliRunner().invoke(app, ["render", *command, "sampler.steps=1"]).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "films").iterdir()) == ["a.mp4", "b.mp4"]
