"""The simulation accepts every schedule that we make and refuses every way to spoil one."""

import sys
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from longvid.geometry import LatentGrid
from longvid.parallel.actions import (
    Admit,
    DropGlobals,
    DropKv,
    DropLatents,
    Encode,
    Finish,
    Forecast,
    Forward,
    GlobalVersion,
    KvVersion,
    LatentVersion,
    Step,
)
from longvid.parallel.findings import Report, ScheduleError
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import queue_schedule, sequential_schedule
from longvid.parallel.verify import grid, simulate
from longvid.plan import ModelFacts, make_plan, sharing_steps
from longvid.script import parse_script
from longvid.settings import load_settings

DROPS = DropLatents | DropKv | DropGlobals
SAME, FRESHER = QueueRules(left_level="same"), QueueRules(left_level="fresher")
CACHED = QueueRules(left="cached")
RULES = st.sampled_from([replace(rules, gap=gap) for rules in (SAME, FRESHER, CACHED) for gap in (1, 1, 2, 3)])


@st.composite
def films(draw):
    """Shots in latents, chunk_latents, context_latents, steps, rules."""
    shots = draw(st.lists(st.integers(1, 10), min_size=1, max_size=3))
    chunk_latents = draw(st.integers(1, 3))
    context_latents = draw(st.integers(0, chunk_latents))
    steps, rules = draw(st.integers(1, 5)), draw(RULES)
    forecast = draw(st.frozensets(st.integers(1, steps - 2))) if steps > 2 else frozenset()
    tokens, memory = draw(st.booleans()), draw(st.integers(0, 3))
    return shots, chunk_latents, context_latents, steps, replace(rules, forecast=forecast, tokens=tokens, memory=memory)


def schedule(make_film, film):
    *shape, steps, rules = film
    chunks = make_film(*shape).chunks
    return chunks, list(queue_schedule(chunks, steps, rules))


def assert_refused(make_film, film, actions):
    *shape, steps, rules = film
    with pytest.raises(ScheduleError):
        simulate(actions, make_film(*shape).chunks, steps, rules)


def makes(action):
    """What an action brings to life or ends."""
    match action:
        case Admit(chunk=i):
            return {LatentVersion(i, 0)}
        case Encode(tokens=value) | DropGlobals(tokens=value):
            return {value}
        case Forward(chunk=i, step=k, store=store):
            return {("velocity", i, k), *store}
        case Forecast(chunk=i, step=k):
            return {("velocity", i, k)}
        case Step(chunk=i, step=k):
            return {LatentVersion(i, k + 1), ("velocity", i, k)}
        case DropLatents(latents=value) | DropKv(kv=value):
            return {value}
    return set()


def touches(action):
    """What an action makes, ends or reads."""
    match action:
        case Encode(latents=latents):
            return makes(action) | set(latents)
        case Forward(chunk=i, step=k, left=left, right=right, tokens=tokens):
            return makes(action) | {LatentVersion(i, k), left, right, tokens} - {None}
        case Step(chunk=i, step=k) | Forecast(chunk=i, step=k):
            return makes(action) | {LatentVersion(i, k)}
        case Finish(latents=latents):
            return {latents}
    return makes(action)


@given(films())
def test_every_queue_is_accepted(make_film, film):
    *_, steps, rules = film
    chunks, actions = schedule(make_film, film)
    report = simulate(actions, chunks, steps, rules)
    assert report.num_forecasts == len(chunks) * len(rules.forecast)
    assert report.num_units == len(chunks) * steps - report.num_forecasts
    assert report.num_rounds == rules.num_rounds(len(chunks), steps)


STORY = """
scenes:
  - {prompt: a red circle, for: 100f}
  - {prompt: a blue ring, for: 61f, transition: {kind: blend, over: 20f}}
  - {prompt: a green square, for: 1f, transition: cut}
  - {prompt: a white ring, for: 77f}
"""


@pytest.mark.parametrize("rules", [SAME, FRESHER, CACHED, replace(CACHED, gap=3)])
@pytest.mark.parametrize("context_latents", [0, 1, 4])
def test_the_queue_of_a_storyboard_is_accepted(context_latents, rules):
    settings = load_settings(None, ["queue.chunk_latents=4", f"queue.context_latents={context_latents}"])
    facts = ModelFacts("toy", "wan", LatentGrid(), 4, 2, 24.0, 64, 64, True, 64)
    chunks = make_plan(parse_script(STORY, "story.yaml"), settings, facts).chunks
    assert len(chunks) > 10
    simulate(queue_schedule(chunks, 8, rules), chunks, 8, rules)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 5))
def test_every_sequential_schedule_is_accepted(make_film, shots, steps):
    chunks = make_film(shots, 9, 0).chunks
    report = simulate(sequential_schedule(chunks, steps), chunks, steps, QueueRules(gap=steps))
    assert report == Report(len(chunks) * steps, 0, len(chunks) * steps, max_live_latents=2, max_live_kv=0)


@pytest.mark.parametrize(
    ("rules", "max_live_latents", "max_live_kv"),
    [
        (FRESHER, 10, 2),
        (SAME, 16, 2),
        (CACHED, 9, 11),
        (replace(CACHED, gap=4), 3, 10),
        (replace(FRESHER, tokens=True, memory=3), 19, 2),
    ],
)
def test_live_state_depends_on_the_steps_and_not_on_the_length_of_the_film(
    make_film, rules, max_live_latents, max_live_kv
):
    for num_chunks in (20, 200):
        chunks = make_film([3 * num_chunks], 3, 2).chunks
        report = simulate(queue_schedule(chunks, 8, rules), chunks, 8, rules)
        assert (report.max_live_latents, report.max_live_kv) == (max_live_latents, max_live_kv)


@given(films(), st.data())
def test_a_removed_action_is_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    del actions[data.draw(st.integers(0, len(actions) - 1))]
    assert_refused(make_film, film, actions)


@given(films(), st.data())
def test_a_repeated_action_is_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    repeated = data.draw(st.sampled_from(actions))
    actions.insert(data.draw(st.integers(actions.index(repeated), len(actions))), repeated)
    assert_refused(make_film, film, actions)


@given(films(), st.data())
def test_dependent_actions_in_swapped_order_are_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    a = data.draw(st.integers(0, len(actions) - 1))
    dependent = [b for b in range(a + 1, len(actions)) if depend(actions[a], actions[b])]
    assume(dependent)
    b = data.draw(st.sampled_from(dependent))
    actions[a], actions[b] = actions[b], actions[a]
    assert_refused(make_film, film, actions)


def depend(a, b):
    return makes(a) & touches(b) or touches(a) & makes(b)


def test_units_of_a_round_out_of_order_are_refused(make_film):
    chunks = make_film([8], 2, 0).chunks
    oldest_first = sorted(queue_schedule(chunks, 3, SAME), key=lambda action: (action.round, chunk_of(action)))
    with pytest.raises(ScheduleError, match="the order is newest first"):
        simulate(oldest_first, chunks, 3, SAME)


def chunk_of(action):
    return action.latents.chunk if isinstance(action, Finish | DropLatents) else action.chunk


def test_neighbours_at_the_same_step_are_refused(make_film):
    chunks = make_film([6], 3, 1).chunks
    z00, z01, z10, z11 = (LatentVersion(i, v) for i in (0, 1) for v in (0, 1))
    together = [Admit(0, 0), Admit(0, 1), Forward(0, 1, 0, left=z00), Step(0, 1, 0), Forward(0, 0, 0), Step(0, 0, 0)]
    together += [DropLatents(0, z00), DropLatents(0, z10), Forward(1, 1, 1, left=z01, store=(KvVersion(1, 1),))]
    together += [Step(1, 1, 1), DropLatents(1, z11), Forward(1, 0, 1, right=KvVersion(1, 1))]
    with pytest.raises(ScheduleError, match="chunk 1 enters in round 1"):
        simulate(together, chunks, 3, SAME)


def test_chunks_that_do_not_finish_in_the_order_of_the_film_are_refused(make_film):
    chunks = make_film([2, 2], 2, 0).chunks
    actions = [Admit(0, 0), Admit(0, 1), Forward(0, 1, 0), Step(0, 1, 0), Finish(0, LatentVersion(1, 1))]
    with pytest.raises(ScheduleError, match="chunk 1 enters in round 1"):
        simulate(actions, chunks, 1, SAME)


def test_kv_that_nobody_reads_is_refused(make_film):
    chunks = make_film([6], 3, 1).chunks
    actions = list(queue_schedule(chunks, 2, SAME))
    last = actions.index(Forward(2, 1, 1, left=LatentVersion(0, 1)))
    actions[last] = replace(actions[last], store=(KvVersion(1, 2),))
    actions.insert(last + 1, DropKv(2, KvVersion(1, 2)))
    with pytest.raises(ScheduleError, match="kv1<@2 was stored and never read"):
        simulate(actions, chunks, 2, SAME)


def shifted(value, delta):
    """Another version of latents, or K/V of another round."""
    if isinstance(value, KvVersion | GlobalVersion):
        return replace(value, round=value.round + delta)
    return replace(value, version=value.version + delta)


def wrong(action, delta):
    """All versions of an action that name a wrong value, chunk, step or round."""
    match action:
        case Admit(chunk=i):
            yield replace(action, chunk=i + delta)
            yield replace(action, round=action.round + delta)
        case Encode(latents=latents, shot=shot):
            yield replace(action, shot=shot + delta)
            yield replace(action, round=action.round + delta)
            yield replace(action, latents=latents[1:])
            yield replace(action, latents=(*latents[:-1], shifted(latents[-1], delta)))
        case DropGlobals(tokens=value):
            yield replace(action, tokens=shifted(value, delta))
            yield replace(action, round=action.round + delta)
        case Forward(round=n, chunk=i, step=k, left=left, right=right, store=store, tokens=tokens):
            yield replace(action, tokens=shifted(tokens, delta) if tokens else GlobalVersion(n, 0))
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
            yield replace(action, left=shifted(left, delta) if left else LatentVersion(i - 1, k))
            yield replace(action, left=None if left else LatentVersion(i - 1, k + 1))
            yield replace(action, right=None if right else KvVersion(i + 1, n))
            yield replace(action, right=shifted(right, delta) if right else KvVersion(i + 1, n - 1))
            yield replace(action, store=store[1:] if store else (KvVersion(i, n),))
            yield replace(action, store=(*store[1:], KvVersion(i, n + delta)))
            yield replace(action, round=n + delta)
        case Step(chunk=i, step=k) | Forecast(chunk=i, step=k):
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
            yield replace(action, round=action.round + delta)
            yield Forward(action.round, i, k)
        case Finish(latents=value):
            yield replace(action, latents=replace(value, version=value.version + delta))
            yield replace(action, latents=replace(value, chunk=value.chunk + delta))
            yield replace(action, round=action.round + delta)
        case DropLatents(latents=value):
            yield replace(action, latents=replace(value, version=value.version + delta))
            yield replace(action, round=action.round + delta)
        case DropKv(kv=value):
            yield replace(action, kv=replace(value, round=value.round + delta))
            yield replace(action, round=action.round + delta)


@given(films(), st.sampled_from([-1, 1]), st.data())
def test_a_wrong_version_chunk_step_or_round_is_refused(make_film, film, delta, data):
    _, actions = schedule(make_film, film)
    at = data.draw(st.integers(0, len(actions) - 1))
    actions[at] = data.draw(st.sampled_from(list(wrong(actions[at], delta))))
    assert_refused(make_film, film, actions)


@pytest.mark.parametrize(
    "rules", [SAME, FRESHER, CACHED, replace(FRESHER, gap=2), replace(SAME, tokens=True, memory=1)]
)
def test_every_wrong_value_in_a_small_film_is_refused(make_film, rules):
    film = [9, 3], 2, 1, 3, rules
    _, actions = schedule(make_film, film)
    for at, action in enumerate(actions):
        for spoilt in (*wrong(action, -1), *wrong(action, 1)):
            assert_refused(make_film, film, [*actions[:at], spoilt, *actions[at + 1 :]])


@given(films(), st.data())
def test_a_drop_before_the_last_reader_is_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    drops = [at for at, action in enumerate(actions) if isinstance(action, DROPS)]
    at = data.draw(st.sampled_from(drops))
    drop = actions.pop(at)
    readers = [b for b in range(at) if touches(actions[b]) & touches(drop)]
    earlier = data.draw(st.integers(0, readers[-1]))
    actions.insert(earlier, replace(drop, round=actions[earlier].round))
    assert_refused(make_film, film, actions)


@given(films(), st.data())
def test_a_drop_in_a_later_round_is_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    last_round = actions[-1].round
    early = [a for a in actions if isinstance(a, DROPS) and a.round < last_round]
    assume(early)
    drop = data.draw(st.sampled_from(early))
    actions.remove(drop)
    later = data.draw(st.sampled_from([at for at, action in enumerate(actions) if action.round > drop.round]))
    actions.insert(later + 1, replace(drop, round=actions[later].round))
    assert_refused(make_film, film, actions)


@given(films(), st.data())
def test_a_missing_drop_is_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    actions.remove(data.draw(st.sampled_from([a for a in actions if isinstance(a, DROPS)])))
    assert_refused(make_film, film, actions)


def test_the_other_left_level_is_refused(make_film):
    chunks = make_film([6], 2, 2).chunks
    with pytest.raises(ScheduleError, match="1  forward  c1 k0  left z0@1  store kv1<@1: the left context is z0@0"):
        simulate(queue_schedule(chunks, 2, FRESHER), chunks, 2, SAME)
    with pytest.raises(ScheduleError, match="1  admit    c1: z0@0 should have been dropped in round 0"):
        simulate(queue_schedule(chunks, 2, SAME), chunks, 2, FRESHER)


def test_the_schedule_of_another_film_is_refused(make_film):
    short, long = make_film([6], 2, 2).chunks, make_film([8], 2, 2).chunks
    with pytest.raises(ScheduleError):
        simulate(queue_schedule(short, 2, SAME), long, 2, SAME)
    with pytest.raises(ScheduleError):
        simulate(queue_schedule(long, 2, SAME), short, 2, SAME)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=5),
    st.integers(1, 3).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b))),
    st.integers(3, 5),
    RULES,
    st.data(),
)
def test_wrong_reads_and_drops_of_a_scenes_end_are_refused(make_scenes, scenes, context, steps, rules, data):
    chunks = make_scenes(scenes, *context).chunks
    rules = replace(rules, sharing=frozenset(sharing_steps(steps)))
    actions = list(queue_schedule(chunks, steps, rules))
    readers = [at for at, action in enumerate(actions) if isinstance(action, Forward) and action.shared]
    ends = [at for at, action in enumerate(actions) if isinstance(action, DropKv) and action.kv.edge == "scene"]
    assume(readers)
    assert ends
    at = data.draw(st.sampled_from(readers))
    shared = data.draw(st.sampled_from([None, *(shifted(actions[at].shared, delta) for delta in (-1, 1))]))
    spoilt = [*actions[:at], replace(actions[at], shared=shared), *actions[at + 1 :]]
    end = data.draw(st.sampled_from(ends))
    for wrong_ones in (spoilt, [*actions[:end], *actions[end + 1 :]]):
        with pytest.raises(ScheduleError):
            simulate(wrong_ones, chunks, steps, rules)


def test_an_empty_schedule_is_refused(make_film):
    with pytest.raises(ScheduleError, match="0 of 1 chunks finished"):
        simulate([], make_film([1], 2, 2).chunks, 2, SAME)


GRID = """\
round  c0  c1  c2  c3
    0   0   .   .   .
    1   1   0   .   .
    2   2   1   0   .   finish c0
    3   .   2   1   0   finish c1
    4   .   .   2   1   finish c2
    5   .   .   .   2   finish c3"""


def test_forecasts_of_steps_that_are_to_be_computed_are_refused(make_film):
    chunks = make_film([6], 2, 2).chunks
    with_forecasts = replace(FRESHER, forecast=frozenset({1}))
    with pytest.raises(ScheduleError, match="step 1 is to be computed"):
        simulate(queue_schedule(chunks, 3, with_forecasts), chunks, 3, FRESHER)
    with pytest.raises(ScheduleError, match="step 1 is to be forecast"):
        simulate(queue_schedule(chunks, 3, FRESHER), chunks, 3, with_forecasts)


def test_the_grid_shows_forecasts(make_film):
    chunks = make_film([6], 2, 2).chunks
    assert grid(queue_schedule(chunks, 3, replace(FRESHER, forecast=frozenset({1})))).splitlines()[1:4] == [
        "    0   0   .",
        "    1  ~1   0",
        "    2   2  ~1   finish c0",
    ]


def test_the_grid_shows_rounds_by_chunks(make_film):
    chunks = make_film([10], 2, 2).chunks
    assert grid(queue_schedule(chunks, 3, FRESHER)) == GRID


@pytest.mark.parametrize("rules", [FRESHER, replace(FRESHER, tokens=True, memory=4)], ids=["plain", "tokens"])
def test_the_work_of_a_proof_grows_with_the_film_and_no_faster(make_film, rules):
    def calls(latents):
        chunks, count = make_film([latents], 2, 1).chunks, 0

        def on_call(frame, event, argument):
            nonlocal count
            count += 1

        sys.setprofile(on_call)
        try:
            simulate(queue_schedule(chunks, 2, rules), chunks, 2, rules)
        finally:
            sys.setprofile(None)
        return count

    assert calls(800) < 2.2 * calls(400)
