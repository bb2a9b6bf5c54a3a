"""The fast recurrence and the rehearsal of all ranks' programs find the same times."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.parallel.actions import Finish, Forward
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decode, Decoding, deal_work
from longvid.parallel.pace import Times, pace_of, run
from longvid.parallel.partition import Costs
from longvid.parallel.pipeline import rank_program
from longvid.parallel.rank_actions import DecoderState, Hidden, Receive, Send, Velocity
from longvid.parallel.rehearsal import rehearse
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import queue_schedule
from longvid.parallel.topology import Topology
from longvid.plan import Chunk, FilmSpan


def make_chunks(count, context=2, shot=1000):
    """`count` chunks, in shots of at most `shot`."""
    chunks = []
    for i in range(count):
        left, right = context * (i % shot > 0), context * (i + 1 < count and (i + 1) % shot > 0)
        chunks.append(Chunk(i, i // shot, 6 * (i % shot), 6, left, right, (), (), (0, 0)))
    return chunks


def rehearsed(chunks, steps, rules, times, stages, decoding=None):
    topology = Topology(stage=stages)
    programs = [rank_program(queue_schedule(chunks, steps, rules), topology, rank, decoding) for rank in range(stages)]

    def cost(rank, action):
        match action:
            case Forward(chunk=i, step=k):
                return times.unit(i, k)[rank]
            case Finish(latents=latents) if decoding is None:
                return times.decode(latents.chunk)
            case Decode(piece=piece):
                works = times.works(chunks[piece.chunk])
                return times.decode(piece.chunk) * sum(works[piece.first : piece.stop]) / max(sum(works), 1)
            case Send(message=DecoderState()) | Receive(message=DecoderState()):
                return times.pack
        return 0.0

    def latency(message):
        if isinstance(message, DecoderState):
            return times.state
        return times.hop(message.chunk) if isinstance(message, Hidden | Velocity) else 0.0

    return rehearse(programs, times.capacity, cost, latency)


def make_times(costs, decode, hop, capacity):
    """Stages of `costs`, and units that differ."""
    return Times(
        unit=lambda i, k: [cost * (1 + (i * 7 + k * 3) % 5) for cost in costs],
        decode=lambda i: decode * (1 + i % 3),
        hop=lambda i: hop * (1 + i % 2),
        capacity=capacity,
    )


costs = st.lists(st.sampled_from([0.25, 1.0, 1.5, 3.0]), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    costs=costs,
    count=st.integers(1, 9),
    steps=st.integers(1, 7),
    rules=st.builds(
        QueueRules,
        left=st.sampled_from(["recompute", "cached"]),
        left_level=st.sampled_from(["same", "fresher"]),
        gap=st.integers(1, 7),
        forecast=st.just(frozenset()) | st.just(frozenset({1, 3})),
    ),
    shot=st.integers(1, 9),
    decode=st.sampled_from([0.0, 0.5, 40.0]),
    hop=st.sampled_from([0.0, 0.125, 5.0]),
    capacity=st.integers(1, 4),
)
def test_a_run_takes_exactly_what_a_rehearsal_takes(costs, count, steps, rules, shot, decode, hop, capacity):
    rules = QueueRules(rules.left, rules.left_level, min(rules.gap, steps), rules.forecast & set(range(1, steps - 1)))
    chunks, times = make_chunks(count, shot=shot), make_times(costs, decode, hop, capacity)
    found, expected = run(chunks, steps, rules, times), rehearsed(chunks, steps, rules, times, len(costs))
    assert found.makespan == pytest.approx(expected.makespan, rel=1e-12)
    assert found.busy == pytest.approx(expected.busy, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    costs=costs,
    extra=st.integers(1, 40),
    steps=st.integers(1, 9),
    decode=st.sampled_from([0.0, 0.5, 40.0]),
    hop=st.sampled_from([0.0, 0.125]),
    left=st.sampled_from(["recompute", "cached"]),
)
def test_the_rest_of_a_long_film_is_counted_as_if_it_were_run(costs, extra, steps, decode, hop, left):
    chunks, rules = make_chunks(max(steps, len(costs)) + 4 + extra), QueueRules(left=left)
    times = Times(lambda i, k: costs, lambda i: decode, lambda i: hop, 4)
    whole, found = run(chunks, steps, rules, times), pace_of(chunks, steps, rules, times)
    assert found.makespan == pytest.approx(
        whole.makespan, rel=0.02, abs=2 * max(costs) + decode
    )  # chunks come in pairs
    assert found.busy == pytest.approx(whole.busy, rel=1e-9)
    assert found.first == whole.first


def test_the_first_chunk_leaves_after_the_triangle_of_units_before_it():
    steps = 6
    times = Times(lambda i, k: [1.0], lambda i: 0.0, lambda i: 0.0, 2)
    assert run(make_chunks(20), steps, QueueRules(), times).first == steps * (steps + 1) // 2


@settings(max_examples=80, deadline=None)
@given(
    layers=st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=6, max_size=9),
    stages=st.integers(2, 4),
    count=st.integers(1, 20),
    steps=st.integers(1, 8),
    gap=st.integers(1, 3),
    forecast=st.just(frozenset()) | st.just(frozenset({1, 3})),
    decode=st.sampled_from([0.0, 0.5, 4.0]),
    hop=st.sampled_from([0.0, 0.125]),
    state=st.sampled_from([(0.0, 0.0), (0.25, 0.0), (0.25, 0.5)]),
    works=st.sampled_from([lambda chunk: (1,) * 6, lambda chunk: (0, 2, 0, chunk.index % 3, 0, 0), lambda _: (0,) * 6]),
)
def test_decoding_on_all_stages_takes_exactly_what_a_rehearsal_takes(
    layers, stages, count, steps, gap, forecast, decode, hop, state, works
):
    bounds, shares = deal_work(Costs(tuple(layers), decode=decode), stages, "stages")
    units = [sum(layers[i] for i in span) for span in bounds]
    chunks, rules = make_chunks(count), QueueRules(gap=min(gap, steps), forecast=forecast & set(range(1, steps - 1)))
    times = Times(lambda i, k: units, lambda i: decode * steps, lambda i: hop, 4, shares, *state, works)
    films = (FilmSpan(range(count), range(1), 0),)
    decoding = StageDecoding(Decoding(shares, chunks, films, span=rules.gap, works=works))
    found, expected = run(chunks, steps, rules, times), rehearsed(chunks, steps, rules, times, stages, decoding)
    assert found.busy == pytest.approx(expected.busy, rel=1e-9)
    assert found.makespan == pytest.approx(expected.makespan, rel=1e-9)
    assert found.first <= found.makespan and (found.first > 0 or not sum(units))


@settings(max_examples=20, deadline=None)
@given(
    layers=st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=6, max_size=9),
    stages=st.integers(2, 4),
    extra=st.integers(1, 40),
    steps=st.integers(3, 8),
    decode=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_the_rest_of_a_long_film_that_stages_decode_is_counted_nearly_as_if_it_were_run(
    layers, stages, extra, steps, decode
):
    bounds, shares = deal_work(Costs(tuple(layers), decode=decode), stages, "stages")
    works = [sum(layers[i] for i in span) for span in bounds]
    chunks, rules = make_chunks(steps + 12 + extra), QueueRules()
    times = Times(lambda i, k: works, lambda i: decode * steps, lambda i: 0.0, 4, shares)
    whole, found = run(chunks, steps, rules, times), pace_of(chunks, steps, rules, times)
    assert found.makespan == pytest.approx(whole.makespan, rel=0.05)
    assert found.first == whole.first
