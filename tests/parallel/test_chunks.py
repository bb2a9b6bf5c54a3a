"""The chunk schedule: all chunks at one step, in groups, and the same film whoever owns which chunk.

The toy arithmetic is exact in float32: inputs of a layer are whole numbers modulo a prime, and fusing with one or three
latents gives quarters.
"""

import queue
import random
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longvid.geometry import LatentGrid
from longvid.parallel.actions import (
    Admit,
    DropGlobals,
    DropLatents,
    Encode,
    Finish,
    Forecast,
    Forward,
    Fuse,
    GlobalVersion,
    LatentVersion,
    OverlapVersion,
    Step,
)
from longvid.parallel.chunk_runs import owners_of, readers_of
from longvid.parallel.collectives import Group
from longvid.parallel.decoding_roles import DecodingOwners
from longvid.parallel.executor import Executor
from longvid.parallel.findings import ScheduleError
from longvid.parallel.lending import NOTHING_LENT, Lending, place_of
from longvid.parallel.mesh import Mesh
from longvid.parallel.pipeline import SAVE_NOTICE, rank_program
from longvid.parallel.rank_actions import Boundary, HandOn, Look, Receive, SaveLatents, Seen
from longvid.parallel.rehearsal import rehearse_schedule
from longvid.parallel.rules import ChunkRules
from longvid.parallel.run_state import Live
from longvid.parallel.schedule import chunk_schedule
from longvid.parallel.stage import Output
from longvid.parallel.topology import Topology
from longvid.parallel.verify import grid, simulate
from longvid.plan import ModelFacts
from longvid.settings import load_settings

SHOTS = st.lists(st.integers(1, 14), min_size=1, max_size=3)
CONTEXT = st.sampled_from([(1, 1), (2, 1), (3, 3), (3, 0), (4, 3)])


@st.composite
def films(draw):
    """Shots in latents, chunk_latents, context_latents, steps, rules."""
    steps = draw(st.integers(1, 5))
    forecast = draw(st.frozensets(st.integers(1, steps - 2))) if steps > 2 else frozenset()
    tokens, memory = draw(st.booleans()), draw(st.integers(0, 3))
    rules = ChunkRules(draw(st.integers(1, 9)), draw(st.integers(0, steps)), forecast, tokens=tokens, memory=memory)
    return draw(SHOTS), *draw(CONTEXT), steps, rules


def lending_of(chunks, steps, rules, topology):
    """What may be lent of a film's units."""
    if rules.tokens or topology.stage * topology.guidance * topology.seq > 1:
        return NOTHING_LENT
    works = tuple(chunk.num_left + chunk.num_latents for chunk in chunks)
    return Lending(works, frozenset(range(steps - 1)) - rules.forecast)


def schedule(make_film, film):
    *shape, steps, rules = film
    chunks = make_film(*shape).chunks
    return chunks, list(chunk_schedule(chunks, steps, rules))


def assert_refused(make_film, film, actions):
    *shape, steps, rules = film
    with pytest.raises(ScheduleError):
        simulate(actions, make_film(*shape).chunks, steps, rules)


# --------------------------------------------------------------------------------------------------------- the schedule


@given(films())
def test_every_schedule_is_accepted_and_bounded_by_its_group(make_film, film):
    *_, steps, rules = film
    chunks, actions = schedule(make_film, film)
    report = simulate(actions, chunks, steps, rules)
    assert report.num_forecasts == len(chunks) * len(rules.forecast)
    assert report.num_units == len(chunks) * steps - report.num_forecasts
    assert report.num_rounds == rules.num_rounds(len(chunks), steps)
    assert report.max_live_latents <= min(rules.group, len(chunks)) + 2 + (rules.memory + 1) * rules.tokens


@given(films())
def test_rounds_take_one_step_of_a_whole_group(make_film, film):
    *_, steps, rules = film
    chunks, actions = schedule(make_film, film)
    groups = rules.groups(len(chunks))
    assert [i for group in groups for i in group] == list(range(len(chunks)))
    assert max(map(len, groups)) <= rules.group and max(map(len, groups)) - min(map(len, groups)) <= 1
    units = [(a.round, a.chunk, a.step) for a in actions if isinstance(a, Forward | Forecast)]
    assert units == [(g * steps + k, i, k) for g, group in enumerate(groups) for k in range(steps) for i in group]
    for rounds in range(rules.num_rounds(len(chunks), steps) + 1):
        assert rules.num_units(len(chunks), steps, rounds) == sum(n < rounds for n, *_ in units)
    finished = [a.latents for a in actions if isinstance(a, Finish)]
    assert finished == [LatentVersion(i, steps) for i in range(len(chunks))]


GROUPS_OF_TWO = """\
    0  admit    c0  left of c1
    0  admit    c1
    0  forward  c0 k0
    0  forward  c1 k0  left z0@0  overlap v1<@0
    0  fuse     c0 k0  with v1<@0
    0  step     c0 k0  left of c1
    0  drop     z0@0
    0  step     c1 k0
    0  drop     z1@0
    1  forward  c0 k1
    1  forward  c1 k1  left z0@1
    1  step     c0 k1
    1  drop     z0@1
    1  finish   z0@2
    1  drop     z0@2
    1  step     c1 k1  left of c2
    1  drop     z1@1
    1  finish   z1@2
    2  admit    c2
    2  forward  c2 k0  left z1@2
    2  step     c2 k0
    2  drop     z2@0
    3  forward  c2 k1  left z1@2
    3  drop     z1@2
    3  step     c2 k1
    3  drop     z2@1
    3  finish   z2@2
    3  drop     z2@2"""
GRID = """\
round  c0  c1  c2
    0   0   0   .
    1   1   1   .   finish c0 c1
    2   .   .   0
    3   .   .   1   finish c2"""


def test_tokens_are_made_of_the_first_chunk_and_of_one_in_each_octave_before_the_group(make_film):
    chunks, rules = make_film([26], 2, 0).chunks, ChunkRules(6, tokens=True, memory=2)
    actions = list(chunk_schedule(chunks, 2, rules))
    encodes = [action for action in actions if isinstance(action, Encode)]
    assert [(a.round, a.readers, [(z.chunk, z.version) for z in a.latents]) for a in encodes] == [
        (1, range(5), [(i, 1) for i in range(5)]),
        (2, range(5, 9), [(0, 2), (2, 2), (4, 2)]),
        (3, range(5, 9), [(0, 2), (2, 2), (4, 2), *((i, 1) for i in range(5, 9))]),
        (4, range(9, 13), [(0, 2), (6, 2), (8, 2)]),
        (5, range(9, 13), [(0, 2), (6, 2), (8, 2), *((i, 1) for i in range(9, 13))]),
    ]
    dropped = {a.latents.chunk: a.round for a in actions if isinstance(a, DropLatents) and a.latents.version == 2}
    assert [dropped[i] for i in range(9)] == [5, 1, 3, 1, 3, 3, 5, 3, 5]


@given(films(), st.builds(Topology, chunk=st.integers(2, 4), stage=st.integers(1, 2), guidance=st.integers(1, 2)))
@settings(deadline=None, max_examples=50)
def test_places_tell_each_other_what_tokens_see_and_none_waits_for_ever(make_film, film, topology):
    *shape, steps, rules = film
    chunks, rules = make_film(*shape).chunks, replace(rules, tokens=True)
    rehearse_schedule(lambda: chunk_schedule(chunks, steps, rules), topology, 2)
    for rank in range(topology.num_ranks):
        place, found = topology.coordinate(rank), set()
        for action in rank_program(chunk_schedule(chunks, steps, rules), topology, rank):
            match action:
                case Look(own=own):
                    found = set(own)
                case Receive(message=Seen(latents=latents)):
                    found |= set(latents)
                case Encode(latents=latents, readers=readers):
                    group = next(group for group in rules.groups(len(chunks)) if readers[0] in group)
                    assert found == set(latents)
                    assert place.chunk in {place_of(i, group, topology.chunk) for i in readers}
                    found = set()
                case Boundary():
                    found = set()


def test_a_group_reads_the_finished_latents_of_the_one_before(make_film):
    chunks, rules = make_film([7], 2, 1).chunks, ChunkRules(2, fused_steps=1)
    assert "\n".join(map(str, chunk_schedule(chunks, 2, rules))) == GROUPS_OF_TWO
    assert grid(chunk_schedule(chunks, 2, rules)) == GRID


def makes(action):
    match action:
        case Admit(chunk=i):
            return {LatentVersion(i, 0)}
        case Encode(tokens=tokens) | DropGlobals(tokens=tokens):
            return {tokens}
        case Forward(chunk=i, step=k, overlap=overlap):
            return {("velocity", i, k), overlap} - {None}
        case Forecast(chunk=i, step=k):
            return {("velocity", i, k)}
        case Fuse(chunk=i, step=k, overlap=overlap):
            return {("velocity", i, k), overlap}
        case Step(chunk=i, step=k):
            return {LatentVersion(i, k + 1), ("velocity", i, k)}
        case DropLatents(latents=value):
            return {value}
    return set()


def touches(action):
    match action:
        case Forward(chunk=i, step=k, left=left, tokens=tokens):
            return makes(action) | {LatentVersion(i, k), left, tokens} - {None}
        case Encode(latents=latents):
            return makes(action) | {*latents}
        case Step(chunk=i, step=k) | Forecast(chunk=i, step=k):
            return makes(action) | {LatentVersion(i, k)}
        case Finish(latents=latents):
            return {latents}
    return makes(action)


def wrong(action, delta):
    """All versions of an action that name a wrong value, chunk, step or round."""
    yield replace(action, round=action.round + delta)
    match action:
        case Admit(chunk=i, group=group, is_left=is_left):
            yield replace(action, chunk=i + delta)
            yield replace(action, group=range(group.start, group.stop + delta))
            yield replace(action, is_left=not is_left)
        case Encode(latents=latents, shot=shot, readers=readers):
            yield replace(action, shot=shot + delta)
            yield replace(action, readers=range(readers.start, readers.stop + delta))
            yield replace(action, latents=latents[:-1])
            yield replace(action, latents=(*latents, replace(latents[-1], chunk=latents[-1].chunk + 1)))
        case DropGlobals(tokens=tokens):
            yield replace(action, tokens=replace(tokens, shot=tokens.shot + delta))
        case Forward(chunk=i, step=k, left=left, overlap=overlap, tokens=tokens):
            yield replace(action, tokens=None if tokens else GlobalVersion(action.round, 0))
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
            yield replace(action, left=replace(left, version=left.version + delta) if left else LatentVersion(i, k))
            yield replace(action, left=None if left else LatentVersion(i - 1, k))
            yield replace(action, overlap=None if overlap else OverlapVersion(i, k))
        case Step(chunk=i, step=k, is_left=is_left):
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
            yield replace(action, is_left=not is_left)
        case Forecast(chunk=i, step=k):
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
        case Fuse(chunk=i, step=k, overlap=overlap):
            yield replace(action, step=k + delta)
            yield replace(action, chunk=i + delta)
            yield replace(action, overlap=replace(overlap, chunk=overlap.chunk + delta))
        case Finish(latents=value) | DropLatents(latents=value):
            yield replace(action, latents=replace(value, version=value.version + delta))
            yield replace(action, latents=replace(value, chunk=value.chunk + delta))


@given(films(), st.sampled_from([-1, 1]), st.data())
def test_every_way_to_spoil_a_schedule_is_refused(make_film, film, delta, data):
    _, actions = schedule(make_film, film)
    at = data.draw(st.integers(0, len(actions) - 1))
    assert_refused(make_film, film, [*actions[:at], *actions[at + 1 :]])
    again = data.draw(st.integers(at, len(actions)))
    assert_refused(make_film, film, [*actions[:again], actions[at], *actions[again:]])
    for spoilt in wrong(actions[at], delta):
        assert_refused(make_film, film, [*actions[:at], spoilt, *actions[at + 1 :]])


@given(films(), st.data())
def test_dependent_actions_in_swapped_order_are_refused(make_film, film, data):
    _, actions = schedule(make_film, film)
    at = data.draw(st.integers(0, len(actions) - 1))
    a = actions[at]
    later = range(at + 1, len(actions))
    dependent = [b for b in later if makes(a) & touches(actions[b]) or touches(a) & makes(actions[b])]
    assume(dependent)
    b = data.draw(st.sampled_from(dependent))
    actions[at], actions[b] = actions[b], actions[at]
    assert_refused(make_film, film, actions)


# ------------------------------------------------------------------------------------------------------------ the ranks

TOPOLOGIES = st.builds(
    Topology, chunk=st.integers(2, 4), stage=st.integers(1, 3), guidance=st.integers(1, 2), seq=st.integers(1, 2)
)


@given(films(), TOPOLOGIES, st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_every_mesh_comes_to_its_end_with_one_buffer(make_film, film, topology, line, by_rows):
    """However many owners decode together."""
    *_, steps, rules = film
    chunks, actions = schedule(make_film, film)
    owners = DecodingOwners(min(line, topology.chunk), by_rows)
    found = rehearse_schedule(
        lambda: actions,
        topology,
        1,
        lambda _, action: float(isinstance(action, Forward)),
        owners=owners,
        lending=lending_of(chunks, steps, rules, topology),
    )
    within = topology.num_ranks // topology.chunk
    assert sum(found.busy) == len(chunks) * (steps - len(rules.forecast)) * within


@given(films(), TOPOLOGIES, st.booleans())
@settings(deadline=None)
def test_every_rank_comes_to_all_boundaries_and_owners_save_their_chunks(make_film, film, topology, decode_together):
    """And it has the leader's word of a round before its own end of it, so SAVE_NOTICE rounds later it surely knows."""
    chunks, actions = schedule(make_film, film)
    *_, steps, rules = film
    rounds = list(range(rules.num_rounds(len(chunks), steps) - 1))
    saved, owners = defaultdict(set), DecodingOwners(topology.chunk if decode_together else 1)
    lending = lending_of(chunks, steps, rules, topology)
    for rank in range(topology.num_ranks):
        place = topology.coordinate(rank)
        program = list(rank_program(actions, topology, rank, owners=owners, lending=lending))
        boundaries = [action.round for action in program if isinstance(action, Boundary)]
        if place.stage == 0 or place.chunk:
            assert boundaries == rounds
        if place.chunk:
            notices = [str(a.message) for a in program if isinstance(a, Boundary | Receive) and "notice" in str(a)]
            assert notices == [f"notice {n}" for n in [*rounds, len(rounds)]]
        for action in program:
            if isinstance(action, SaveLatents):
                saved[action.round] |= {(place.chunk, z) for z in action.latents}
    assert SAVE_NOTICE >= 2
    for n, found in saved.items():
        group = rules.groups(len(chunks))[n // steps]
        newest = {LatentVersion(i, n % steps + 1) for i in group} if (n + 1) % steps else set()
        assert newest <= {z for _, z in found}
        assert len(found) == len({z for _, z in found})
        assert all(place == place_of(z.chunk, group, topology.chunk) for place, z in found if z.chunk in group)


def test_owners_that_decode_together_take_as_long_as_the_slowest_part(make_film):
    """But for the first round, in which borders are noise, and the first chunk's way to the leader."""
    chunks, steps, rules = make_film([241], 6, 1).chunks, 4, ChunkRules(64)

    def cost(rank, action):
        parts = [0.8, 1.0, 0.9]
        is_decoding = isinstance(action, HandOn) or (isinstance(action, Finish) and rank == 0)
        return 1.0 if isinstance(action, Forward) else parts[rank] * is_decoding

    topology = Topology(chunk=3)
    found = rehearse_schedule(lambda: chunk_schedule(chunks, steps, rules), topology, 2, cost, owners=DecodingOwners(3))
    assert found.makespan <= 1.07 * max(found.busy)


def test_ranks_with_equal_runs_do_not_wait_for_each_other(make_film):
    """But for the first round, in which borders are noise. One rank may be half a round late without harm."""
    chunks, rules = make_film([241], 6, 1).chunks, ChunkRules(64, fused_steps=4)
    assert len(chunks) == 40
    clock = {rank: random.Random(rank) for rank in range(4)}

    def cost(rank, action):
        return clock[rank].uniform(0.5, 1.5) if isinstance(action, Forward) else 0.0

    found = rehearse_schedule(lambda: chunk_schedule(chunks, 10, rules), Topology(chunk=4), 2, cost)
    assert found.makespan <= 1.01 * max(found.busy)


@pytest.mark.parametrize(("latents", "size"), [(67, 2), (53, 2), (241, 3)])
def test_ranks_that_lend_units_have_as_much_to_do_as_each_other_and_hardly_wait(make_film, latents, size):
    """However many chunks there are, and however short the last one is."""
    steps, topology, rules = 20, Topology(chunk=size), ChunkRules(64, fused_steps=8)
    chunks = make_film([latents], 6, 2).chunks
    lending = lending_of(chunks, steps, rules, topology)

    def cost(rank, action):
        return lending.works[action.chunk] if isinstance(action, Forward) else 0

    actions = list(chunk_schedule(chunks, steps, rules))
    with_loans, without = (
        rehearse_schedule(lambda: actions, topology, 2, cost, lending=some).makespan for some in (lending, NOTHING_LENT)
    )
    assert with_loans <= 1.03 * steps * sum(lending.works) / size
    assert with_loans < without


# -------------------------------------------------------------------------------------------------------- the executor

PRIME = 251
SHAPE = (2, 2, 1)  # channels, height, width
LAYERS = 3


def layer(values, times, step):
    """What a toy layer makes of [C, F, h, w] and timesteps [F]."""
    values, frames = np.floor(values), np.arange(1, values.shape[1] + 1).reshape(1, -1, 1, 1)
    total = (frames * (values + times.reshape(1, -1, 1, 1))).sum(axis=1, keepdims=True)
    return (values * values + 3 * total + 11 * step) % PRIME


class ToyStage:
    num_branches = 1

    def __init__(self, layers=range(LAYERS)):
        self.layers = layers

    def hidden_shape(self, num_latents, latent_size):
        return (1, SHAPE[0] * num_latents * latent_size[0] * latent_size[1], 1), torch.float32

    def forward(self, unit):
        count = len(unit.timesteps)
        values = unit.hidden.reshape(SHAPE[0], count, *SHAPE[1:]) if unit.latents is None else unit.latents
        values = values.double().numpy()
        for _ in self.layers:
            values = layer(values, unit.timesteps.double().numpy(), unit.step)
        made = torch.from_numpy(values).float()
        if LAYERS - 1 in self.layers:
            return Output(velocity=made[None, :, -unit.num_predicted :])
        return Output(hidden=made.reshape(1, -1, 1))


class ToySolver:
    previous = 0

    def step(self, velocity, step, sample):
        previous, self.previous = self.previous, velocity
        return (sample + velocity + 2 * previous + step) % PRIME


class ToySampler:
    new_solver = ToySolver

    def __init__(self, num_steps):
        self.num_steps = num_steps

    def timestep(self, step):
        return 100.0 - 13 * step if step < self.num_steps else 0.0


def toy_noise(chunk):
    generator = torch.Generator().manual_seed(chunk.index)
    return torch.randint(PRIME, (SHAPE[0], chunk.num_latents, *SHAPE[1:]), generator=generator).float()


def loop(chunks, steps, rules):
    """Finished latents of every chunk, by the formula."""
    time = ToySampler(steps).timestep

    @cache
    def latents(i, k):
        if k == 0:
            return toy_noise(chunks[i]).double().numpy()
        return (latents(i, k - 1) + velocity(i, k - 1) + 2 * (velocity(i, k - 2) if k > 1 else 0) + k - 1) % PRIME

    def border(i):
        return any(i == group.start for group in rules.groups(len(chunks)))

    @cache
    def predicted(i, k):
        before, level = chunks[i].num_left, steps if border(i) else k
        values, times = latents(i, k), [time(level)] * before + [time(k)] * chunks[i].num_latents
        if before:
            values = np.concatenate([latents(i - 1, level)[:, -before:], values], axis=1)
        for _ in range(LAYERS):
            values = layer(values, np.array(times), k)
        return values

    @cache
    def velocity(i, k):
        made = predicted(i, k)[:, chunks[i].num_left :].copy()
        if i + 1 < len(chunks) and chunks[i + 1].num_left and not border(i + 1) and k < rules.fused_steps:
            count = chunks[i + 1].num_left
            weights = (np.arange(1, count + 1) / (count + 1)).reshape(1, -1, 1, 1)
            made[:, -count:] = (1 - weights) * made[:, -count:] + weights * predicted(i + 1, k)[:, :count]
        return made

    return [latents(i, steps) for i in range(len(chunks))]


class ThreadComm:
    """The way between executors in threads of one process, with a random delay for every message."""

    def __init__(self, rank, boxes, seed):
        self.rank, self.boxes, self.random = rank, boxes, random.Random(f"{seed}:{rank}")

    def send(self, header, payload, to, *, window=0, is_sized=False):
        time.sleep(self.random.choice([0, 0, 1e-4, 2e-3]))
        self.boxes[self.rank, to].put((header, payload.clone()))

    def receive(self, source, shape, dtype, *, is_sized=False):
        return ThreadIncoming(self.boxes[source, self.rank], tuple(shape), dtype)

    def flush(self):
        pass


class ThreadIncoming:
    def __init__(self, box, shape, dtype):
        self.box, self.shape, self.dtype = box, shape, dtype

    def wait(self):
        header, payload = self.box.get(timeout=20)
        assert payload.dtype == self.dtype and self.shape == tuple(payload.shape)
        return header, payload


class Keeper:
    """A saver that keeps what it is given after one round; on the leader, some rounds after round `at`."""

    def __init__(self, at):
        self.at, self.latents, self.solvers = at, {}, {}

    def is_due(self, done):
        return done == self.at

    def save_kv(self, done, kv):
        assert not kv

    def save_latents(self, done, latents, solvers):
        self.done, self.latents = done, dict(latents)
        self.solvers = {i: solver.previous for i, solver in solvers.items()}

    def save_films(self, done):
        """There are none."""


FACTS = ModelFacts("toy", "toy", LatentGrid(), SHAPE[0], 1, 24.0, 16, 16, per_token_timesteps=True, max_latents=64)


def run_on_ranks(plan, steps, rules, topology, seed=0, keepers=None, lives=None, done=-1):
    """The leader's finished chunks, with all that may be lent; `lives` and `done` are of a run that goes on."""
    boxes, alone = defaultdict(queue.SimpleQueue), Group((0,), 0)
    lending = lending_of(plan.chunks, steps, rules, topology)
    bounds = [range(LAYERS * s // topology.stage, LAYERS * (s + 1) // topology.stage) for s in range(topology.stage)]

    def run_rank(rank):
        mesh = Mesh(topology, rank, ThreadComm(rank, boxes, seed), alone, alone, alone)
        stage = ToyStage(bounds[mesh.place.stage])
        toy = Executor(stage, ToySampler(steps), toy_noise, FACTS, SHAPE[1:], guidance=3.0, mesh=mesh, lending=lending)
        toy.saver = keepers[rank] if keepers else None
        live = lives[rank] if lives else Live()
        return list(toy.run(chunk_schedule(plan.chunks, steps, rules), plan, live=live, done=done)), live

    with ThreadPoolExecutor(topology.num_ranks) as pool:
        results = list(pool.map(run_rank, range(topology.num_ranks)))
    assert all(box.empty() for box in boxes.values())
    assert not any(finished for finished, _ in results[1:])
    assert not any(value for _, live in results for value in vars(live).values())
    return results[0][0]


@given(
    films(),
    st.builds(Topology, chunk=st.integers(1, 4), stage=st.integers(1, 2), guidance=st.sampled_from([1, 1, 2])),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_mesh_equals_the_loop_bit_for_bit(make_film, film, topology, seed):
    """Both branches of the toy predict the same, so guidance between them changes nothing."""
    *shape, steps, rules = film
    plan, rules = make_film(*shape), replace(rules, forecast=frozenset(), tokens=False)
    finished = run_on_ranks(plan, steps, rules, topology, seed)
    assert [clip.chunk for clip in finished] == list(plan.chunks)
    for clip, expected in zip(finished, loop(plan.chunks, steps, rules), strict=True):
        assert clip.latents.dtype == torch.float32
        assert np.array_equal(clip.latents.numpy(), expected)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("at", [2, 3, 4, 7])
def test_a_run_with_lent_units_goes_on_after_any_round(make_film, size, at):
    """Each rank with the latents that the checkpoint's reader would give it."""
    asked = ["schedule=chunks", "sampler.steps=8", "chunks.group=9", "chunks.fuse=0.5"]
    chosen, topology = load_settings(None, asked), Topology(chunk=size)
    plan, steps, rules = make_film([52], 3, 2), 8, ChunkRules.of(chosen)
    assert Lending.of(plan, chosen, topology) == lending_of(plan.chunks, steps, rules, topology) != NOTHING_LENT
    keepers = [Keeper(at) for _ in range(size)]
    whole = run_on_ranks(plan, steps, rules, topology, keepers=keepers)
    done = at + SAVE_NOTICE
    assert {keeper.done for keeper in keepers} == {done}
    owners, readers = owners_of(plan, chosen, size), readers_of(plan, chosen, topology)
    kept = {z: value for keeper in keepers for z, value in keeper.latents.items()}
    lives = [Live() for _ in range(size)]
    for z, value in kept.items():
        lives[owners[z.chunk]].latents[z] = value
        for place in readers(z) - {owners[z.chunk]}:
            lives[place].borders[z] = value
    for live, keeper in zip(lives, keepers, strict=True):
        for i, previous in keeper.solvers.items():
            live.solvers[i] = ToySolver()
            live.solvers[i].previous = previous
    rest = run_on_ranks(plan, steps, rules, topology, lives=lives, done=done)
    for clip, expected in zip(rest, whole[-len(rest) :], strict=True):
        assert torch.equal(clip.latents, expected.latents)
    assert len(rest) >= 8
