"""The schedules hold to the semantics of the queue, stream, and print one line an action."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.parallel.actions import Admit, DropLatents, Encode, Finish, Forward, KvVersion, LatentVersion, Step
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import queue_schedule, sequential_schedule
from longvid.parallel.snapshot import is_remembered, key_latents, snapshot
from longvid.plan import Chunk

SHOTS = st.lists(st.integers(1, 12), min_size=1, max_size=4)
CONTEXT = st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, b)))
STEPS = st.integers(1, 6)
SAME, FRESHER, CACHED = QueueRules(left_level="same"), QueueRules(), QueueRules(left="cached")
RULES = st.sampled_from([replace(rules, gap=gap) for rules in (SAME, FRESHER, CACHED) for gap in (1, 1, 2, 3)])


def forwards(actions):
    return [action for action in actions if isinstance(action, Forward)]


@given(SHOTS, CONTEXT, STEPS, RULES)
def test_every_unit_runs_once_in_its_round_newest_first(make_film, shots, context, steps, rules):
    chunks = make_film(shots, *context).chunks
    actions = list(queue_schedule(chunks, steps, rules))
    units = [(action.round, action.chunk, action.step) for action in forwards(actions)]
    assert sorted((i, k) for _, i, k in units) == [(i, k) for i in range(len(chunks)) for k in range(steps)]
    assert all(n == rules.gap * i + k for n, i, k in units)
    assert units == sorted(units, key=lambda unit: (unit[0], -unit[1]))
    assert [(a.chunk, a.step) for a in actions if isinstance(a, Step)] == [(i, k) for _, i, k in units]


@given(SHOTS, CONTEXT, STEPS, RULES)
def test_a_forward_reads_the_left_context_that_was_asked_for(make_film, shots, context, steps, rules):
    chunks = make_film(shots, *context).chunks
    for action in forwards(queue_schedule(chunks, steps, rules)):
        i, k = action.chunk, action.step
        expected = None
        if chunks[i].num_left and rules.left == "cached":
            expected = KvVersion(i - 1, action.round - rules.gap, "last")
        elif chunks[i].num_left:
            ahead = rules.gap if rules.left_level == "fresher" else 0
            expected = LatentVersion(i - 1, min(k + ahead, steps))
        assert action.left == expected


@given(SHOTS, CONTEXT, STEPS, RULES)
def test_right_context_was_stored_in_the_same_round_and_all_that_is_stored_is_read(
    make_film, shots, context, steps, rules
):
    chunks = make_film(shots, *context).chunks
    stored = set()
    for action in forwards(queue_schedule(chunks, steps, rules)):
        has_right = chunks[action.chunk].num_right > 0 and action.step >= rules.gap
        assert action.right == (KvVersion(action.chunk + 1, action.round) if has_right else None)
        if action.right:
            stored.remove(action.right)
        if isinstance(action.left, KvVersion):
            stored.remove(action.left)
        stored |= set(action.store)
    assert not stored


@given(SHOTS, STEPS, RULES)
def test_no_context_crosses_a_cut(make_film, shots, steps, rules):
    chunks = make_film(shots, 2, 2).chunks
    for action in forwards(queue_schedule(chunks, steps, rules)):
        for neighbour in filter(None, (action.left, action.right)):
            assert chunks[neighbour.chunk].shot == chunks[action.chunk].shot


@given(SHOTS, CONTEXT, STEPS, RULES)
def test_chunks_finish_in_the_order_of_the_film(make_film, shots, context, steps, rules):
    chunks = make_film(shots, *context).chunks
    finishes = [action for action in queue_schedule(chunks, steps, rules) if isinstance(action, Finish)]
    assert [action.latents for action in finishes] == [LatentVersion(i, steps) for i in range(len(chunks))]
    assert [action.round for action in finishes] == [rules.gap * i + steps - 1 for i in range(len(chunks))]


def test_finished_latents_wait_for_the_last_step_of_the_right_neighbour(make_film):
    chunks = make_film([6], 2, 2).chunks
    actions = list(queue_schedule(chunks, 3, FRESHER))
    drop = actions.index(DropLatents(3, LatentVersion(0, 3)))
    assert actions.index(Finish(2, LatentVersion(0, 3))) < drop
    assert [a for a in actions[:drop] if getattr(a, "left", None) == LatentVersion(0, 3)]


def test_a_film_of_a_million_chunks_starts_at_once(make_film):
    chunks = make_film([6], 2, 2).chunks
    actions = queue_schedule(chunks[:1] + chunks[1:2] * 1_000_000, 50, FRESHER)
    assert list(islice(actions, 1)) == [Admit(0, 0)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), STEPS)
def test_sequential_takes_one_chunk_after_the_other(make_film, shots, steps):
    chunks = make_film(shots, 9, 0).chunks
    actions = list(sequential_schedule(chunks, steps))
    assert [(a.chunk, a.step) for a in forwards(actions)] == [(i, k) for i in range(len(chunks)) for k in range(steps)]
    assert [a.round for a in forwards(actions)] == list(range(len(chunks) * steps))


def test_sequential_refuses_chunks_with_context(make_film):
    with pytest.raises(AssertionError, match="whole shot"):
        list(sequential_schedule(make_film([6], 2, 2).chunks, 2))


QUEUE_OF_TWO = """\
    0  admit    c0
    0  forward  c0 k0
    0  step     c0 k0
    0  drop     z0@0
    1  admit    c1
    1  forward  c1 k0  left z0@1  store kv1<@1
    1  step     c1 k0
    1  drop     z1@0
    1  forward  c0 k1  right kv1<@1
    1  drop     kv1<@1
    1  step     c0 k1
    1  drop     z0@1
    1  finish   z0@2
    2  forward  c1 k1  left z0@2
    2  drop     z0@2
    2  step     c1 k1
    2  drop     z1@1
    2  finish   z1@2
    2  drop     z1@2"""


def test_a_schedule_prints_one_line_an_action(make_film):
    chunks = make_film([6], 3, 1).chunks
    assert "\n".join(map(str, queue_schedule(chunks, 2, FRESHER))) == QUEUE_OF_TWO


QUEUE_OF_TWO_SAME_LEVEL = """\
    0  admit    c0
    0  forward  c0 k0
    0  step     c0 k0
    1  admit    c1
    1  forward  c1 k0  left z0@0  store kv1<@1
    1  drop     z0@0
    1  step     c1 k0
    1  drop     z1@0
    1  forward  c0 k1  right kv1<@1
    1  drop     kv1<@1
    1  step     c0 k1
    1  finish   z0@2
    1  drop     z0@2
    2  forward  c1 k1  left z0@1
    2  drop     z0@1
    2  step     c1 k1
    2  drop     z1@1
    2  finish   z1@2
    2  drop     z1@2"""


def test_left_context_of_the_same_level_lives_one_round_longer(make_film):
    chunks = make_film([6], 3, 1).chunks
    assert "\n".join(map(str, queue_schedule(chunks, 2, SAME))) == QUEUE_OF_TWO_SAME_LEVEL


QUEUE_OF_TWO_CACHED = """\
    0  admit    c0
    0  forward  c0 k0  store kv0>@0
    0  step     c0 k0
    0  drop     z0@0
    1  admit    c1
    1  forward  c1 k0  left kv0>@0  store kv1<@1
    1  drop     kv0>@0
    1  step     c1 k0
    1  drop     z1@0
    1  forward  c0 k1  right kv1<@1  store kv0>@1
    1  drop     kv1<@1
    1  step     c0 k1
    1  drop     z0@1
    1  finish   z0@2
    1  drop     z0@2
    2  forward  c1 k1  left kv0>@1
    2  drop     kv0>@1
    2  step     c1 k1
    2  drop     z1@1
    2  finish   z1@2
    2  drop     z1@2"""


def test_cached_left_context_is_what_the_neighbour_stored_at_the_same_step(make_film):
    chunks = make_film([6], 3, 1).chunks
    assert "\n".join(map(str, queue_schedule(chunks, 2, CACHED))) == QUEUE_OF_TWO_CACHED


def test_a_gap_keeps_fewer_chunks_in_flight(make_film):
    chunks = make_film([12], 3, 1).chunks
    per_round = Counter(a.round for a in forwards(queue_schedule(chunks, 6, replace(FRESHER, gap=3))))
    assert max(per_round.values()) == 2


TOKENS = QueueRules(tokens=True, memory=2)


def test_global_tokens_are_made_of_a_shots_latents_as_they_stood_a_round_before(make_film):
    """Of five chunks and two steps: what is in flight, the chunk before, one of the two before that, and the first."""
    chunks = make_film([7, 13], 3, 1).chunks
    encodes = [a for a in queue_schedule(chunks, 2, TOKENS) if isinstance(a, Encode)]
    assert [str(action)[5:].strip() for action in encodes] == [
        "encode   g0@2  of z0@1",
        "encode   g1@4  of z2@1",
        "encode   g1@5  of z2@2 z3@1",
        "encode   g1@6  of z2@2 z3@2 z4@1",
    ]


@given(SHOTS, CONTEXT, STEPS, RULES, st.integers(0, 4))
def test_all_units_of_a_round_read_the_same_tokens_and_none_of_another_shot(
    make_film, shots, context, steps, rules, memory
):
    chunks = make_film(shots, *context).chunks
    made = {}
    for action in queue_schedule(chunks, steps, replace(rules, tokens=True, memory=memory)):
        if isinstance(action, Encode):
            made[action.tokens] = action.latents
            assert {chunks[latents.chunk].shot for latents in action.latents} == {action.shot}
            assert all(0 < latents.version <= steps for latents in action.latents)
            assert sum(latents.version == steps for latents in action.latents) <= memory + (memory > 0)
        if isinstance(action, Forward) and action.tokens:
            assert action.tokens in made and action.tokens.round == action.round
            assert action.tokens.shot == chunks[action.chunk].shot
    assert {action.tokens for action in queue_schedule(chunks, steps, rules) if isinstance(action, Forward)} <= {None}


@given(st.integers(0, 300), st.integers(1, 8), st.integers(0, 6))
def test_a_finished_chunk_that_is_forgotten_once_is_never_remembered_again(first, num_chunks, octaves):
    seen = [is_remembered(first, first - num_chunks, oldest, octaves) for oldest in range(first + 1, first + 200)]
    assert seen == sorted(seen, reverse=True)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5), st.data())
def test_a_snapshot_is_bounded_and_has_the_first_chunk_and_all_in_flight(start, count, steps, gap, octaves, data):
    shot = range(start, start + count)
    n = data.draw(st.integers(0, gap * shot[-1] + steps + 5))
    found = dict(snapshot(shot, n, steps, gap, octaves))
    stood = {i: min(n - 1 - gap * i, steps) for i in shot}
    assert {i: v for i, v in stood.items() if 0 < v < steps}.items() <= found.items()
    assert all(stood[i] == version for i, version in found.items())
    finished = [i for i, version in found.items() if version == steps]
    assert len(finished) <= octaves + (octaves > 0)
    assert (start in finished) == (octaves > 0 and stood[start] == steps)


@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 5))
def test_key_latents_of_neighbouring_chunks_are_evenly_spaced(start, num_latents, spacing):
    chunk = Chunk(0, 0, start, num_latents, 0, 0, (), (), (0, 0))
    places = [start + latent for latent in key_latents(chunk, spacing)]
    assert places == [place for place in range(start, start + num_latents) if place % spacing == 0]
