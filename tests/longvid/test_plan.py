"""The plan: every frame in one chunk, neighbours that agree, prompts that follow the scenes, and DualParal's noise."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.geometry import LatentGrid
from longvid.plan import INDEPENDENT_NOISE, ModelFacts, PromptBlend, make_plan
from longvid.script import Duration, Scene, Script, Transition
from longvid.settings import QueueSettings, Settings


def facts(temporal=4, max_latents=1024):
    return ModelFacts("mini", "wan", LatentGrid(temporal), 8, 10, 16.0, 64, 64, True, max_latents)


def frames(count):
    return Duration(count, "f")


def scene(prompt, num_frames, over=None, kind="blend", **rest):
    transition = Transition(kind, frames(over)) if over else Transition()
    return Scene(prompt, frames(num_frames), transition, **rest)


def queue(chunk_latents=6, context_latents=2, **rest):
    return Settings(queue=QueueSettings(chunk_latents=chunk_latents, context_latents=context_latents, **rest))


def film(*num_frames, settings=None, **rest):
    """The plan of one shot a number."""
    scenes = tuple(scene(f"p{i}", n) for i, n in enumerate(num_frames))
    return make_plan(Script(scenes, **rest), settings or queue(), facts())


@st.composite
def scripts(draw):
    """Scripts of scenes from one frame up; what blends is long enough for any grid of the tests."""
    count = draw(st.integers(1, 8))
    scenes = []
    for i in range(count):
        blends = i > 0 and draw(st.booleans())
        kind = draw(st.sampled_from(["blend", "share"]))
        num_frames = draw(st.integers(8 if blends else 1, 120))
        over = draw(st.integers(1, num_frames)) if blends else None
        seed = draw(st.none() | st.integers(0, 2))
        scenes.append(
            scene(draw(st.sampled_from("abc")), num_frames, over, kind, seed=seed, negative=draw(st.sampled_from("xy")))
        )
    return Script(tuple(scenes), seed=draw(st.integers(0, 2)))


@st.composite
def any_settings(draw):
    chunk = draw(st.integers(1, 9))
    noise = draw(st.sampled_from(["coordinated", "independent"]))
    section = QueueSettings(chunk_latents=chunk, context_latents=draw(st.integers(1, chunk)), noise=noise)
    return Settings(schedule=draw(st.sampled_from(["queue", "queue", "sequential"])), queue=section)


GRIDS = st.sampled_from([1, 2, 4, 8])


def own_frames(plan, grid, chunk):
    """The frames of a film that a chunk's own latents decode to, trimmed to its shot."""
    shot = plan.shots[chunk.shot]
    for latent in range(chunk.start, chunk.start + chunk.num_latents):
        yield from (shot.first_frame + f for f in grid.frames_of(latent) if f < shot.num_frames)


# ------------------------------------------------------------------------------------------------ frames, chunks, shots


@given(scripts(), any_settings(), GRIDS)
def test_every_frame_of_every_scene_belongs_to_exactly_one_chunk(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    rendered = [f for chunk in plan.chunks for f in own_frames(plan, LatentGrid(temporal), chunk)]
    asked = [f for span in plan.scenes for f in range(span.first_frame, span.first_frame + span.num_frames)]
    assert rendered == asked == list(range(plan.num_frames))


@given(scripts(), any_settings(), GRIDS)
def test_a_film_has_the_frames_that_its_storyboard_asks_for(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    assert [span.num_frames for span in plan.scenes] == [scene.duration.frames(16) for scene in script.scenes]
    assert plan.num_frames == sum(shot.num_frames for shot in plan.shots)


@given(scripts(), any_settings(), GRIDS)
def test_a_shot_is_a_run_of_scenes_without_a_cut(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    assert len(plan.shots) == sum(scene.transition.kind == "cut" for scene in script.scenes)
    for before, span, scene_ in zip(plan.scenes, plan.scenes[1:], script.scenes[1:], strict=False):
        assert span.shot == before.shot + (scene_.transition.kind == "cut")
    for shot in plan.shots:
        members = [span for span in plan.scenes if span.shot == shot.index]
        assert shot.first_frame == members[0].first_frame
        assert shot.num_frames == sum(span.num_frames for span in members)
        assert shot.num_latents == LatentGrid(temporal).num_latents(shot.num_frames)


@given(scripts(), any_settings(), GRIDS)
def test_chunks_tile_their_shots_in_order(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    assert [chunk.index for chunk in plan.chunks] == list(range(len(plan.chunks)))
    assert sum(shot.num_chunks for shot in plan.shots) == len(plan.chunks)
    for shot in plan.shots:
        chunks = plan.chunks[shot.first_chunk : shot.first_chunk + shot.num_chunks]
        assert {chunk.shot for chunk in chunks} == {shot.index}
        latents = [f for chunk in chunks for f in range(chunk.start, chunk.start + chunk.num_latents)]
        assert latents == list(range(shot.num_latents))


@given(scripts(), any_settings(), GRIDS)
def test_chunks_have_the_sizes_of_the_queue(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    size, context = settings.queue.chunk_latents, settings.queue.context_latents
    for shot in plan.shots:
        sizes = [chunk.num_latents for chunk in plan.chunks if chunk.shot == shot.index]
        if settings.schedule == "sequential":
            assert sizes == [shot.num_latents]
        else:
            assert sizes[0] == min(shot.num_latents, size + context)
            assert all(n == size for n in sizes[1:-1])
            assert all(0 < n <= size for n in sizes[1:])


@given(scripts(), any_settings(), GRIDS)
def test_context_is_what_the_neighbours_in_the_shot_have(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    context = settings.queue.context_latents
    assert plan.chunks[0].num_left == plan.chunks[-1].num_right == 0
    for left, right in pairwise(plan.chunks):
        together = left.shot == right.shot
        assert right.num_left == (min(context, left.num_latents) if together else 0)
        assert left.num_right == (min(context, right.num_latents) if together else 0)


def test_a_film_of_ragged_shots():
    plan = film(1, 29, 30, 100)
    assert [[c.num_latents for c in plan.chunks if c.shot == s.index] for s in plan.shots] == [
        [1],
        [8],
        [8, 1],
        [8, 6, 6, 6],
    ]
    assert [(c.start, c.num_left, c.num_right) for c in plan.chunks[2:4]] == [(0, 0, 1), (8, 2, 0)]


def test_seconds_become_frames_at_the_storyboards_rate_or_else_the_models():
    seconds = (Scene("a", Duration(2.5, "s")),)
    assert make_plan(Script(seconds), queue(), facts()).num_frames == 40
    plan = make_plan(Script(seconds, fps=23.976), queue(), facts())
    assert (plan.num_frames, plan.fps) == (60, 23.976)


# ------------------------------------------------------------------------------------------------------------- prompts


@given(scripts(), any_settings(), GRIDS)
def test_a_latent_follows_the_scene_that_holds_its_first_frame(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    grid = LatentGrid(temporal)
    for chunk in plan.chunks:
        assert len(chunk.prompts) == chunk.num_left + chunk.num_latents
        for latent, blend in enumerate(chunk.prompts, chunk.start - chunk.num_left):
            frame = plan.shots[chunk.shot].first_frame + grid.frames_of(latent)[0]
            [i] = [i for i, s in enumerate(plan.scenes) if s.first_frame <= frame < s.first_frame + s.num_frames]
            assert blend.b == plan.scenes[i].prompt
            assert 0 <= blend.weight < 1
            assert (blend.weight == 0) == (blend.a == blend.b)
            assert blend.a in {plan.scenes[i].prompt, plan.scenes[i - 1].prompt}
            if blend.weight:
                over = script.scenes[i].transition.over.frames(16)
                assert frame < plan.scenes[i].first_frame + max(over, temporal)


@given(scripts(), any_settings(), GRIDS)
def test_pairs_of_prompt_and_negative_are_unique_and_are_the_scenes_own(script, settings, temporal):
    plan = make_plan(script, settings, facts(temporal))
    pairs = list(zip(plan.prompts, plan.negatives, strict=True))
    assert len(set(pairs)) == len(pairs)
    assert [pairs[span.prompt] for span in plan.scenes] == [(scene.prompt, scene.negative) for scene in script.scenes]


def test_a_blend_goes_over_in_equal_steps():
    script = Script((scene("a", 17), scene("b", 40, over=16)))
    plan = make_plan(script, queue(20), facts())
    [chunk] = plan.chunks
    assert chunk.prompts[:5] == (PromptBlend(0, 0),) * 5
    assert chunk.prompts[5:9] == tuple(PromptBlend(0, 1, w) for w in (1 / 5, 2 / 5, 3 / 5, 4 / 5))
    assert set(chunk.prompts[9:]) == {PromptBlend(1, 1)}


def test_a_blend_shorter_than_a_latent_still_has_one():
    # Frame 18 begins the scene, frame 21 its first latent, when the blend of one frame is over.
    plan = make_plan(Script((scene("a", 18), scene("b", 40, over=1))), queue(20), facts())
    assert plan.chunks[0].prompts[5:8] == (PromptBlend(0, 0), PromptBlend(0, 1, 0.5), PromptBlend(1, 1))


def test_a_blend_starts_from_the_scene_before_even_where_that_one_blends_to_its_end():
    plan = make_plan(Script((scene("a", 17), scene("b", 8, over=8), scene("c", 16, over=4))), queue(20), facts())
    assert plan.chunks[0].prompts[5:8] == (PromptBlend(0, 1, 1 / 3), PromptBlend(0, 1, 2 / 3), PromptBlend(1, 2, 0.5))


def test_the_left_context_keeps_its_own_scenes_prompts():
    plan = make_plan(Script((scene("a", 29), scene("b", 40, over=1))), queue(), facts())
    left, right = plan.chunks[:2]
    assert right.prompts[: right.num_left] == left.prompts[-right.num_left :] == (PromptBlend(0, 0),) * 2


@given(scripts(), any_settings(), GRIDS)
def test_chunks_that_share_read_the_end_of_the_scene_before(script, settings, temporal):
    """Of the scene that a chunk's first latent is in; and only of latents that the one before it owns."""
    plan, grid = make_plan(script, settings, facts(temporal)), LatentGrid(temporal)
    for chunk in plan.chunks:
        shot = plan.shots[chunk.shot]
        inside = [i for i, span in enumerate(plan.scenes) if span.shot == chunk.shot]
        first_latents = {i: grid.num_latents(plan.scenes[i].first_frame - shot.first_frame) for i in inside}
        now = max(i for i in inside if first_latents[i] <= chunk.start)
        over = script.scenes[now].transition.over
        begun = first_latents[now]
        end = grid.num_latents(plan.scenes[now].first_frame - shot.first_frame + over.frames(16)) if over else 0
        shares = script.scenes[now].transition.kind == "share" and chunk.start < max(begun + 1, end)
        assert (chunk.shares is not None) == shares
        if not shares:
            continue
        source = plan.chunks[chunk.shares]
        latents = range(source.start + source.scene_end.first, source.start + source.scene_end.stop)
        assert latents.stop == begun and chunk.index <= source.scene_end.last_reader
        assert latents.start >= max(source.start, first_latents[now - 1])
        assert 1 <= len(latents) <= settings.queue.context_latents


def test_a_scene_that_shares_takes_its_own_prompt_at_once():
    plan = make_plan(Script((scene("a", 17), scene("b", 40, 16, "share"))), queue(20), facts())
    assert plan.chunks[0].prompts == (PromptBlend(0, 0),) * 5 + (PromptBlend(1, 1),) * 10


@pytest.mark.parametrize(
    ("settings", "changed", "reason"),
    [
        (queue(context_latents=0), {}, "queue.context_latents to 1 or more"),
        (Settings(sampler={"steps": 2}), {}, "sampler.steps of 3 or more, not 2"),
        (Settings(attention={"policy": "tile"}), {}, "attention.policy must be dense, not tile"),
        (Settings(cache={"policy": "first_block"}), {}, "cache.policy first_block leaves out layers"),
        (Settings(cache={"policy": "ras"}), {}, "cache.policy ras leaves out layers"),
        (Settings(schedule="chunks"), {}, "with schedule=chunks all chunks are at one step"),
        (queue(), {"relative_positions": False}, "mini adds positions to its tokens"),
    ],
)
def test_sharing_is_refused_where_it_cannot_be(settings, changed, reason):
    script = Script((scene("a", 17), scene("b", 40, 16, "share", line=3)), path="story.yaml")
    with pytest.raises(InputError, match=rf"story\.yaml:3: the transition `share` cannot be: .*{reason}"):
        make_plan(script, settings, replace(facts(), **changed))
    at_once = settings.model_copy(update={"schedule": "sequential"})
    assert make_plan(script, at_once, replace(facts(), **changed)).chunks[0].shares is None


@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize("kind", ["cut", "blend", "share"])
def test_storyboards_of_few_and_many_short_scenes_with_repeated_prompts(count, kind):
    """Scenes of 9 frames are two or three latents: a chunk holds several."""
    scenes = [scene("ab"[i % 2], 9, 4 if i and kind != "cut" else None, kind) for i in range(count)]
    plan = make_plan(Script(tuple(scenes)), queue(), facts())
    assert plan.num_frames == 9 * count and len(plan.scenes) == count
    assert plan.prompts == ("a", "b")[:count]
    assert len(plan.shots) == (count if kind == "cut" else 1)
    own = [blend for chunk in plan.chunks for blend in chunk.prompts[-chunk.num_latents :]]
    assert {blend.b for blend in own} == set(range(min(count, 2)))


# --------------------------------------------------------------------------------------------------------------- noise


@given(scripts(), any_settings(), GRIDS)
def test_a_chunk_has_a_draw_for_each_own_latent_and_none_twice(script, settings, temporal):
    for chunk in make_plan(script, settings, facts(temporal)).chunks:
        assert len(chunk.noise) == len(set(chunk.noise)) == chunk.num_latents


@given(scripts(), any_settings(), GRIDS)
def test_coordinated_noise_is_shared_but_never_with_the_context(script, settings, temporal):
    assume(settings.schedule == "queue" and settings.queue.noise == "coordinated")
    plan = make_plan(script, settings, facts(temporal))
    size, context = settings.queue.chunk_latents, settings.queue.context_latents
    assert all(set(chunk.noise) <= set(range(size + context)) for chunk in plan.chunks)
    for left, right in pairwise(plan.chunks):
        if left.noise_key == right.noise_key and context:
            assert not set(left.noise[-context:]) & set(right.noise)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), any_settings())
def test_without_seeds_of_scenes_a_shot_has_one_key(lengths, settings):
    assume(settings.schedule == "sequential" or settings.queue.noise == "coordinated")
    plan = film(*lengths, settings=settings, seed=5)
    assert all(chunk.noise_key == (5, chunk.shot) for chunk in plan.chunks)


@given(st.integers(1, 9), st.data(), st.integers(1, 60))
def test_coordinated_noise_is_dualparals_template(size, data, num_latents):
    """template = cat(template[-context:], template[a permutation of size]), and a chunk takes its last `size`."""
    context = data.draw(st.integers(0, size))
    plan = film(1 + 4 * (num_latents - 1), settings=queue(size, context))
    template = list(range(size + context))
    assert list(plan.chunks[0].noise) == template[:num_latents]
    for chunk in plan.chunks[1:]:
        assert set(chunk.noise) <= set(template[:size])
        template = [*template[size:], *chunk.noise]


def test_the_shuffle_is_the_same_for_ever():
    plan = film(150, seed=7)
    assert [chunk.noise for chunk in plan.chunks[1:4]] == [(2, 4, 3, 1, 5, 0), (3, 2, 6, 4, 1, 7), (3, 0, 2, 6, 4, 5)]


def test_independent_noise_has_a_key_for_each_chunk():
    plan = film(60, 60, settings=queue(noise="independent"), seed=3)
    assert [c.noise_key for c in plan.chunks] == [(3, INDEPENDENT_NOISE + i) for i in range(len(plan.chunks))]
    assert all(c.noise == tuple(range(c.num_latents)) for c in plan.chunks)


@given(st.integers(1, 29), st.integers(0, 9))
def test_a_shot_of_one_chunk_starts_from_the_noise_of_the_whole_clip(num_frames, seed):
    whole = film(num_frames, settings=Settings(schedule="sequential"), seed=seed)
    assert film(num_frames, seed=seed).chunks == whole.chunks


def test_a_blended_scene_with_its_own_seed_starts_a_new_base():
    script = Script((scene("a", 61), scene("b", 60, over=8, seed=9), scene("c", 60, over=8), scene("d", 29)), seed=1)
    plan = make_plan(script, queue(), facts())
    keys = [chunk.noise_key for chunk in plan.chunks]
    changed = keys.index((9, 0))
    in_scene = [plan.scenes[0].num_frames <= LatentGrid().frames_of(c.start)[0] for c in plan.chunks if c.shot == 0]
    assert keys == [(9 if inside else 1, 0) for inside in in_scene] + [(1, 1)]
    assert plan.chunks[changed].noise == (2, 3, 4, 5, 6, 7)
    assert plan.chunks[changed - 1].noise_key == (1, 0)


def test_a_scenes_seed_changes_its_shot_and_no_other():
    scenes = [scene("a", 50), scene("b", 50), scene("c", 50)]
    plain = make_plan(Script(tuple(scenes)), queue(), facts())
    scenes[1] = scene("b", 50, seed=4)
    seeded = make_plan(Script(tuple(scenes)), queue(), facts())
    for before, after in zip(plain.chunks, seeded.chunks, strict=True):
        assert (before == after) == (before.shot != 1)


# ------------------------------------------------------------------------------------------------------ limits and cost


def test_a_scene_without_a_cut_that_holds_no_latents_first_frame_is_refused():
    script = Script((scene("a", 2), scene("b", 2, over=1, line=7)), path="story.yaml")
    with pytest.raises(InputError, match=r"story\.yaml:7: 2 frames are too few .* a latent holds 4"):
        make_plan(script, queue(), facts())


def test_a_blend_longer_than_its_scene_at_the_models_rate_is_refused():
    late = Scene("b", frames(8), Transition("blend", Duration(1, "s")), line=3)
    with pytest.raises(InputError, match=r"story\.yaml:3: the blend over 1s is longer than its scene of 8f"):
        make_plan(Script((scene("a", 20), late), path="story.yaml"), queue(), facts())


def test_a_size_off_the_grid_is_refused_with_its_line():
    with pytest.raises(InputError, match=r"story\.yaml:2: size 100 x 64: .*96 and 112"):
        make_plan(Script((scene("a", 20),), size=(100, 64), path="story.yaml", size_line=2), queue(), facts())


def test_chunks_beyond_the_models_positions_are_refused():
    with pytest.raises(InputError, match=r"0 \+ 8 \+ 2 = 10: reduce queue.chunk_latents"):
        make_plan(Script((scene("a", 200),)), queue(), facts(max_latents=9))
    assert make_plan(Script((scene("a", 200),)), queue(), facts(max_latents=10)).chunks


def test_a_clip_at_once_beyond_the_models_positions_is_refused():
    sequential = Settings(schedule="sequential")
    with pytest.raises(InputError, match=r"story\.yaml:1: mini takes at most 20 latents .* has 21: use schedule=queue"):
        make_plan(Script((scene("a", 81, line=1),), path="story.yaml"), sequential, facts(max_latents=20))


def test_a_film_beyond_a_day_is_refused():
    with pytest.raises(InputError, match=r"26\.0 hours long; 24 is the most"):
        make_plan(Script((Scene("a", Duration(13 * 3600, "s")),) * 2), queue(), facts())


@given(scripts(), any_settings())
def test_the_same_script_gives_the_same_plan(script, settings):
    assert make_plan(script, settings, facts()) == make_plan(script, settings, facts())


def test_a_film_of_ten_hours_is_planned_at_once():
    script = Script((Scene("a", Duration(10 * 3600, "s")),))
    started = time.process_time()
    plan = make_plan(script, queue(), facts())
    assert time.process_time() - started < 20
    assert len(plan.chunks) == 24_000
