"""The rehearsal gives the overheads that theory gives, and refuses programs that would wait for ever."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.parallel.actions import Finish, Forward, LatentVersion
from longvid.parallel.findings import ScheduleError
from longvid.parallel.partition import Costs
from longvid.parallel.pipeline import SAVE_NOTICE, rank_program
from longvid.parallel.rank_actions import Boundary, Hidden, Receive, SaveLatents, Send
from longvid.parallel.rehearsal import rehearse, rehearse_schedule, stage_costs
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import queue_schedule
from longvid.parallel.topology import Topology

SAME, FRESHER, CACHED = QueueRules(left_level="same"), QueueRules(), QueueRules(left="cached")
FORECASTS = st.sampled_from([(), (1, 2, 4), (1,), (2, 3, 4)])


WITH_TOKENS = replace(FRESHER, tokens=True, memory=3)


def with_forecasts(rules, forecast, steps):
    return replace(rules, forecast=frozenset(forecast) & frozenset(range(1, steps - 1)))


def slots(rank, action):
    return 1.0 if isinstance(action, Forward) else 0.0


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("buffers", [1, 2])
def test_a_full_pipe_wastes_what_theory_says(make_film, num_stages, buffers):
    chunks = make_film([62], 6, 2).chunks
    best, usual = (num_stages - 1) ** 2, num_stages**2 - 1
    for rules, wasted in ((SAME, best), (CACHED, best), (FRESHER, usual), (WITH_TOKENS, usual)):
        found = rehearse_schedule(
            lambda r=rules: queue_schedule(chunks, 10, r), Topology(stage=num_stages), buffers, slots
        )
        assert found.makespan == len(chunks) * 10 + wasted
        assert sum(found.busy) == len(chunks) * 10 * num_stages


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([SAME, FRESHER, CACHED, QueueRules(gap=3), WITH_TOKENS]),
    st.builds(Topology, stage=st.integers(1, 4), guidance=st.integers(1, 2), seq=st.integers(1, 3)),
    FORECASTS,
)
@settings(deadline=None)
def test_every_mesh_comes_to_its_end_with_one_buffer(make_film, shots, steps, rules, topology, forecast):
    chunks, rules = make_film(shots, 3, 2).chunks, with_forecasts(rules, forecast, steps)
    found = rehearse_schedule(lambda: queue_schedule(chunks, steps, rules), topology, 1, slots)
    assert sum(found.busy) == len(chunks) * (steps - len(rules.forecast)) * topology.num_ranks


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.integers(1, 6),
    st.sampled_from([SAME, FRESHER, CACHED, QueueRules(gap=3), WITH_TOKENS]),
    FORECASTS,
)
def test_one_rank_does_the_schedule_as_it_is(make_film, shots, steps, rules, forecast):
    chunks, rules = make_film(shots, 3, 2).chunks, with_forecasts(rules, forecast, steps)
    program = rank_program(queue_schedule(chunks, steps, rules), Topology(), 0)
    done = [action for action in program if not isinstance(action, Boundary | SaveLatents)]
    assert done == list(queue_schedule(chunks, steps, rules))


def test_a_finished_chunk_does_not_wait_for_the_end_of_the_film(make_film):
    """With a single step nothing is ever read again; steps are put off all the same, but not for long."""
    chunks = make_film([60], 2, 0).chunks
    program = list(rank_program(queue_schedule(chunks, 1, SAME), Topology(stage=2), 0))
    rounds = {}
    latest = 0
    for action in program:
        latest = max(latest, action.round)
        if isinstance(action, Finish):
            rounds[action.round] = latest
    assert all(seen <= done + 2 for done, seen in rounds.items())


@given(
    st.integers(1, 5),
    st.sampled_from([SAME, FRESHER, CACHED]),
    st.builds(Topology, stage=st.integers(1, 3), guidance=st.integers(1, 2), seq=st.integers(1, 2)),
    FORECASTS,
)
@settings(deadline=None)
def test_every_rank_hears_of_a_save_in_time(make_film, steps, rules, topology, forecast):
    """What the leader decides at the end of a round, all know before they come to the end of the one it names."""
    chunks, rules = make_film([40], 3, 2).chunks, with_forecasts(rules, forecast, steps)
    programs = [
        list(rank_program(queue_schedule(chunks, steps, rules), topology, r)) for r in range(topology.num_ranks)
    ]
    told = {0: 5}  # the leader decides at the boundary of round 5
    sent = {}
    place = [0] * len(programs)
    heard = {0: 5}
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while place[rank] < len(program):
                action = program[place[rank]]
                if isinstance(action, Receive):
                    if (action.message, rank) not in sent:
                        break
                    if sent.pop((action.message, rank)) and rank not in heard:
                        heard[rank] = None
                elif isinstance(action, Send):
                    knows = rank in heard and (
                        rank != 0 or place[0] > programs[0].index(boundary(programs[0], told[0]))
                    )
                    sent[action.message, action.to] = knows
                elif isinstance(action, Boundary) and action.round == told[0] + SAVE_NOTICE:
                    assert rank in heard, f"rank {rank} comes to round {action.round} unaware"
                place[rank] += 1
                moved = True
    assert all(done == len(program) for done, program in zip(place, programs, strict=True))


def boundary(program, round_):
    return next(action for action in program if isinstance(action, Boundary) and action.round == round_)


def test_ranks_that_wait_for_each_other_are_refused():
    hidden = Hidden(0, 0, 0, False)
    programs = [[Receive(0, hidden, 1), Send(0, hidden, 1)], [Receive(0, hidden, 0), Send(0, hidden, 0)]]
    with pytest.raises(ScheduleError, match=r"deadlock with 2 buffers: rank 0: .*receive .*; rank 1: .*receive"):
        rehearse(programs, 2)


def test_a_forward_of_several_ranks_waits_for_all_of_them():
    forward, made = Forward(0, 0, 0), LatentVersion(0, 1)
    programs = [[forward, Send(0, made, 1)], [Receive(0, made, 0), forward]]
    with pytest.raises(ScheduleError, match="deadlock"):
        rehearse(programs, 1, together=[(0, 1)])
    rehearse(programs, 1)


def test_a_message_that_nobody_takes_or_expects_is_refused():
    a, b = Hidden(0, 0, 0, False), Hidden(1, 0, 0, False)
    with pytest.raises(ScheduleError, match="never receives it"):
        rehearse([[Send(0, a, 1)], []], 2)
    with pytest.raises(ScheduleError, match="but hidden c0 k0 comes"):
        rehearse([[Send(0, a, 1)], [Receive(0, b, 0)]], 2)


def test_decoding_counts_where_chunks_are_handed_out(make_film):
    chunks = make_film([62], 6, 2).chunks
    costs, topology = Costs((1.0,) * 4, decode=0.5), Topology(stage=2)
    cost = stage_costs(costs, topology, [range(2), range(2, 4)], 10)
    found = rehearse_schedule(lambda: queue_schedule(chunks, 10, SAME), topology, 2, cost)
    assert found.busy == (len(chunks) * 10 * 2.5, len(chunks) * 10 * 2.0)
