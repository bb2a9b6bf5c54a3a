"""Decoding is dealt out as its costs say, placed where every latent is there, and nobody waits for ever for a state."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.geometry import DecoderPasses
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import LAG, Decode, Decoded, Decoding, HandOut, Shares, deal_work
from longvid.parallel.findings import ScheduleError
from longvid.parallel.partition import Costs
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.rules import ChunkRules, QueueRules
from longvid.parallel.schedule import chunk_schedule, queue_schedule
from longvid.parallel.topology import Topology
from longvid.parallel.verify_decoding import simulate_decoding

SHARES = st.builds(
    lambda parts: Shares(tuple(part / sum(parts) for part in parts)),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
)
RULES = st.sampled_from(
    [QueueRules(), QueueRules(gap=3), QueueRules(left="cached"), ChunkRules(group=3, fused_steps=1)]
)


def schedule_of(chunks, steps, rules):
    make = chunk_schedule if isinstance(rules, ChunkRules) else queue_schedule
    return make(chunks, steps, rules)


@given(SHARES, st.integers(1, 100), st.integers(1, 9))
def test_every_stage_gets_its_share_and_of_every_chunk_the_earlier_ones_come_first(shares, num_chunks, num_latents):
    counts = [0] * len(shares.of_stages)
    for chunk in range(num_chunks):
        stages = shares.stages(chunk, [1] * num_latents)
        assert stages == sorted(stages)
        counts = [count + stages.count(stage) for stage, count in enumerate(counts)]
    for share, count in zip(shares.of_stages, counts, strict=True):
        assert abs(count - share * num_chunks * num_latents) <= 4
        assert share or not count


PASSES = st.builds(
    lambda step, more, first: DecoderPasses(first or step + more, step, step + more),
    st.integers(1, 3),
    st.integers(0, 3),
    st.just(0),
) | st.just(DecoderPasses(3, 2, 2))


@given(SHARES, PASSES, st.integers(1, 60), st.integers(1, 9))
def test_latents_that_wait_go_with_those_that_they_wait_for(shares, passes, num_chunks, num_latents):
    shot, loads = num_chunks * num_latents, [0] * len(shares.of_stages)
    for chunk in range(num_chunks):
        works = passes.works(range(chunk * num_latents, (chunk + 1) * num_latents), shot)
        stages = shares.stages(chunk, works)
        assert stages == sorted(stages) and all(shares.of_stages[stage] for stage in stages)
        working = [stage for stage, work in zip(stages, works, strict=True) if work]
        for latent, work in enumerate(works):
            if working and not work:  # with the next that is decoded; at the chunk's end with the last
                later = [stage for stage, work in zip(stages[latent:], works[latent:], strict=True) if work]
                assert stages[latent] == (later or working[-1:])[0]
        for stage, work in zip(stages, works, strict=True):
            loads[stage] += work
    total, most = sum(loads), passes.first + 2 * passes.window
    for share, load in zip(shares.of_stages, loads, strict=True):
        assert abs(load - share * total) <= 4 * most + 0.1 * total


@given(
    st.lists(st.floats(0.1, 3), min_size=4, max_size=10).map(tuple),
    st.floats(0, 10),
    st.integers(2, 4),
)
def test_no_stage_has_more_than_it_must(layers, decode, num_stages):
    bounds, shares = deal_work(Costs(layers, decode=decode), num_stages, "stages")
    assert shares and sum(shares.of_stages) == pytest.approx(1)
    works = Costs(layers).of_stages(bounds)
    loads = [work + share * decode for work, share in zip(works, shares.of_stages, strict=True)]
    assert max(loads) == pytest.approx(max(*works, (sum(layers) + decode) / num_stages))


def test_the_leader_alone_decodes_where_the_settings_say_so():
    bounds, shares = deal_work(Costs((1.0,) * 10, decode=4.0), 2, "leader")
    assert shares is None and bounds == (range(3), range(3, 10))


@given(st.lists(st.integers(1, 15), min_size=1, max_size=3), st.integers(1, 6), RULES, SHARES, PASSES)
@settings(deadline=None)
def test_every_latent_is_decoded_once_where_its_films_state_is(make_film, shots, steps, rules, shares, passes):
    plan = make_film(shots, 3, 1)
    decoding = Decoding.of(shares, plan, rules, steps, passes)
    stream = list(decoding.spread(schedule_of(plan.chunks, steps, rules)))
    done = simulate_decoding(stream, plan.chunks, plan.films)
    assert sum(done.values()) == sum(chunk.num_latents for chunk in plan.chunks)
    assert all(shares.of_stages[stage] for stage in done)
    of_schedule = [action for action in stream if not hasattr(action, "piece") and hasattr(action, "round")]
    last = max(action.round for action in of_schedule)
    assert [action.round for action in stream if isinstance(action, Decoded)] == list(range(last + 1))


def test_a_schedule_that_decodes_wrongly_is_refused(make_film):
    plan = make_film([20], 4, 1)
    decoding = Decoding.of(Shares((0.5, 0.5)), plan, QueueRules(), 3)
    right = list(decoding.spread(queue_schedule(plan.chunks, 3, QueueRules())))
    decodes = [action for action in right if isinstance(action, Decode)]
    first_hand_out = next(action for action in right if isinstance(action, HandOut))
    stay = replace(decodes[0], move=None)
    for wrong, message in (
        ([action for action in right if action != decodes[2]], "not the next|not decoded"),
        ([stay if action == decodes[0] else action for action in right], "another stage"),
        ([first_hand_out, *(action for action in right if action != first_hand_out)], "finished then"),
        ([action for action in right if not isinstance(action, Decode | HandOut)], "not handed out"),
    ):
        with pytest.raises(ScheduleError, match=message):
            simulate_decoding(wrong, plan.chunks, plan.films)


@given(
    st.lists(st.integers(1, 15), min_size=1, max_size=2),
    st.integers(1, 6),
    RULES,
    SHARES,
    st.sampled_from([{}, {"guidance": 2}, {"seq": 2}, {"chunk": 2}]),
)
@settings(deadline=None)
def test_every_mesh_that_decodes_comes_to_its_end_with_one_buffer(make_film, shots, steps, rules, shares, axes):
    plan = make_film(shots, 3, 1)
    if "chunk" in axes:
        rules = ChunkRules(group=3, fused_steps=1)
    topology = Topology(stage=len(shares.of_stages), **axes)
    decoding = StageDecoding(Decoding.of(shares, plan, rules, steps))
    decoded = []

    def cost(rank, action):
        if isinstance(action, Decode):
            decoded.append((rank, action.piece))
        return float(isinstance(action, Decode))

    rehearse_schedule(lambda: schedule_of(plan.chunks, steps, rules), topology, 1, cost, decoding)
    assert sum(piece.stop - piece.first for _, piece in decoded) == sum(chunk.num_latents for chunk in plan.chunks)
    assert all(topology.coordinate(rank).stage == piece.stage for rank, piece in decoded)


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_long_film_keeps_stages_that_decode_at_work(make_film, num_stages):
    """Decoding takes a third of a unit's time, so a leader that does it alone has a third more to do."""
    plan, steps, rules = make_film([360], 6, 2), 20, QueueRules()
    costs, topology = Costs((1.0,) * 8, decode=0.3 * 8 / num_stages), Topology(stage=num_stages)

    def makespan(mode):
        bounds, shares = deal_work(costs, num_stages, mode)
        cost = stage_costs(costs, topology, bounds, steps, chunk_work=6 if shares else None)
        decoding = StageDecoding(Decoding.of(shares, plan, rules, steps)) if shares else None
        return rehearse_schedule(
            lambda: queue_schedule(plan.chunks, steps, rules), topology, 4, cost, decoding
        ).makespan

    ideal = costs.total * len(plan.chunks) * steps / num_stages
    assert ideal <= makespan("stages") < 1.04 * ideal
    assert makespan("stages") < makespan("leader")


def test_chunks_are_handed_out_when_the_first_stage_has_put_off_none_of_their_steps(make_film):
    plan = make_film([30], 3, 1)
    decoding = Decoding.of(Shares((0.5, 0.5)), plan, QueueRules(), 4)
    latest = -1
    for action in decoding.spread(queue_schedule(plan.chunks, 4, QueueRules())):
        if isinstance(action, HandOut):
            assert latest >= min(action.round + LAG - 1, 4 + len(plan.chunks) - 2)
        elif not isinstance(action, Decode | Decoded):
            latest = max(latest, action.round)
