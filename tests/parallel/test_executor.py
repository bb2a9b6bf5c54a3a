"""The executor against a brute-force recursion over (chunk, step), bit for bit, and the bounds on what it keeps.

The toy arithmetic is whole numbers modulo a prime below 2^8: exact in float32 and in float64, while any wrong
value, position, timestep or solver history that is read gives other numbers.
"""

import gc
import queue
import random
import time
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.cache.plan import CachePlan, GateRules, StepPlan
from longvid.cache.runtime import CacheRuntime
from longvid.errors import RuntimeFailure
from longvid.geometry import LatentGrid
from longvid.parallel.actions import Step
from longvid.parallel.collectives import Group
from longvid.parallel.comm import Header
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decoding, Shares
from longvid.parallel.executor import Executor
from longvid.parallel.mesh import Mesh
from longvid.parallel.rehearsal import rehearse_schedule
from longvid.parallel.rules import QueueRules
from longvid.parallel.run_state import Live
from longvid.parallel.schedule import queue_schedule, sequential_schedule
from longvid.parallel.stage import Begun, Output
from longvid.parallel.topology import Topology
from longvid.parallel.verify import simulate
from longvid.plan import ModelFacts, sharing_steps

PRIME = 251
SHAPE = (2, 2, 1)  # channels, height, width
LAYERS = 4
SHARING = range(2, 4)
SAME, FRESHER, CACHED = QueueRules(left_level="same"), QueueRules(), QueueRules(left="cached")
RULES = [replace(rules, gap=gap) for rules in (SAME, FRESHER, CACHED) for gap in (1, 1, 2, 3)]


def mix(inputs, times, left, right, step, shared=None):
    """What a toy layer makes of inputs [C, F, h, w], timesteps [F] and K/V [C, R, h, w] or None, in float64."""
    frames, times = np.arange(1, inputs.shape[1] + 1).reshape(1, -1, 1, 1), times.reshape(1, -1, 1, 1)
    total = (frames * (inputs + times)).sum(axis=1, keepdims=True)
    for weight, kv in ((7, right), (13, left), (17, shared)):
        if kv is not None:
            frames_of_kv = np.arange(1, kv.shape[1] + 1).reshape(1, -1, 1, 1)
            total = total + weight * (frames_of_kv * kv).sum(axis=1, keepdims=True)
    return (inputs * inputs + 3 * total + 5 * frames * times + 11 * step) % PRIME


class ToyStage:
    """Some of LAYERS layers. Their K/V are what they made, so they carry on all that the unit read."""

    def __init__(self, layers=range(LAYERS)):
        self.layers = layers
        self.kv_alive = []
        self.num_branches = 1

    def hidden_shape(self, num_latents, latent_size):
        return (1, SHAPE[0] * num_latents * latent_size[0] * latent_size[1], 1), torch.float32

    def begin(self, unit):
        """The gate is before the first layer, and looks at nothing."""
        return Begun(unit, torch.zeros(()), None)

    def go_on(self, begun, *, is_left_out):
        return self.forward(begun.unit)

    def forward(self, unit):
        count = len(unit.timesteps)
        assert unit.timesteps.dtype == torch.float32
        if 0 in self.layers:
            assert unit.latents.dtype == torch.float32 and unit.hidden is None
            values = unit.latents.double().numpy()
        else:
            assert unit.latents is None
            values = unit.hidden.reshape(SHAPE[0], count, *SHAPE[1:]).double().numpy()
        assert values.shape[1] == count
        spans = [[] for _ in unit.store]
        for index, _ in enumerate(self.layers):
            left, right = (None if kv is None else kv[index].double().numpy() for kv in (unit.left, unit.right))
            shared = unit.shared[index].double().numpy() if unit.shared and index in unit.sharing else None
            values = mix(values, unit.timesteps.double().numpy(), left, right, unit.step, shared)
            for span, kept in zip(unit.store, spans, strict=True):
                kept.append(torch.from_numpy(values[:, span]).float().clone())
                self.kv_alive.append(weakref.ref(kept[-1]))
        made = torch.from_numpy(values).float()
        if LAYERS - 1 in self.layers:
            return Output(velocity=made[None, :, -unit.chunk.num_latents :], kv=tuple(spans))
        return Output(hidden=made.reshape(1, -1, 1), kv=tuple(spans))


class ToySolver:
    """Needs its own history: adds the velocity of the step before."""

    def __init__(self):
        self.previous = 0

    def step(self, velocity, step, sample):
        previous, self.previous = self.previous, velocity
        return (sample + velocity + 2 * previous + step) % PRIME


class ToySampler:
    def __init__(self, num_steps):
        self.num_steps = num_steps

    def timestep(self, step):
        return 100.0 - 13 * step if step < self.num_steps else 0.0

    def new_solver(self):
        return ToySolver()


def toy_noise(chunk):
    generator = torch.Generator().manual_seed(chunk.index)
    shape = (SHAPE[0], chunk.num_latents, *SHAPE[1:])
    return torch.randint(PRIME, shape, generator=generator).float()


def recursion(chunks, steps, rules, per_token, first=0, recalled=None):  # noqa: C901 - a value for each rule
    """Finished latents of every chunk, straight from the semantics: a value is defined by the values that it reads."""
    time = ToySampler(steps).timestep

    @cache
    def latents(i, k):
        if i < first:
            return recalled
        if k == 0:
            return toy_noise(chunks[i]).numpy().astype(np.float64)
        velocity = own(i, k - 1)
        before = own(i, k - 2) if k > 1 else 0
        return (latents(i, k - 1) + velocity + 2 * before + k - 1) % PRIME

    def own(i, k):
        return layer(i, k, LAYERS)[:, -chunks[i].num_latents :]

    def times(i, k):
        levels = [k] * chunks[i].num_latents
        if recomputes(i):
            levels = [level_of_left(i, k) if per_token else k] * chunks[i].num_left + levels
        return np.array([time(level) for level in levels])

    def recomputes(i):
        return chunks[i].num_left and (rules.left == "recompute" or i == first)

    def level_of_left(i, k):
        if i == first:
            return steps
        return k if rules.left_level == "same" else min(k + rules.gap, steps)

    @cache
    def layer(i, k, depth):
        """What the unit's latents are after `depth` layers."""
        chunk, left, right = chunks[i], None, None
        if depth == 0:
            if recomputes(i):
                return np.concatenate(
                    [latents(i - 1, level_of_left(i, k))[:, -chunk.num_left :], latents(i, k)], axis=1
                )
            return latents(i, k)
        if chunk.num_left and not recomputes(i):
            left = layer(i - 1, k, depth)[:, -chunk.num_left :]
        if chunk.num_right and k >= rules.gap:
            newer = layer(i + 1, k - rules.gap, depth)[:, -chunks[i + 1].num_latents :]
            right = newer[:, : chunk.num_right]
        shared = None
        if chunk.shares is not None and k in rules.sharing and depth - 1 in SHARING:
            source = chunks[chunk.shares]
            own_of_source = layer(chunk.shares, k, depth)[:, -source.num_latents :]
            shared = own_of_source[:, source.scene_end.first : source.scene_end.stop]
        return mix(layer(i, k, depth - 1), times(i, k), left, right, k, shared)

    return [latents(i, steps) for i in range(first, len(chunks))]


def executor(steps, stage=None, sampler=None, noise=toy_noise, per_token=True):
    facts = ModelFacts("toy", "toy", LatentGrid(), 2, 1, 24.0, 16, 16, per_token_timesteps=per_token, max_latents=64)
    stage = stage or ToyStage()
    sharing = range(max(SHARING.start - stage.layers.start, 0), SHARING.stop - stage.layers.start)
    return Executor(stage, sampler or ToySampler(steps), noise, facts, SHAPE[1:], sharing=sharing)


def run(plan, steps, rules=FRESHER, stage=None, per_token=True):
    actions = queue_schedule(plan.chunks, steps, rules)
    return executor(steps, stage, per_token=per_token).run(actions, plan)


def assert_equal(finished, plan, oracle):
    finished = list(finished)
    assert [clip.chunk for clip in finished] == list(plan.chunks[plan.first_chunk :])
    for clip, expected in zip(finished, oracle, strict=True):
        assert clip.latents.dtype == torch.float32
        assert np.array_equal(clip.latents.numpy(), expected)


@given(
    shots=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    context=st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, b))),
    steps=st.integers(1, 5),
    rules=st.sampled_from(RULES),
    per_token=st.booleans(),
)
@settings(deadline=None)
def test_the_queue_equals_the_recursion_bit_for_bit(make_film, shots, context, steps, rules, per_token):
    plan = make_film(shots, *context)
    finished = run(plan, steps, rules, per_token=per_token)
    assert_equal(finished, plan, recursion(plan.chunks, steps, rules, per_token))


@pytest.mark.parametrize("rules", [SAME, FRESHER, CACHED, replace(CACHED, gap=2)])
@pytest.mark.parametrize(
    ("shots", "chunk_latents", "context_latents", "steps"),
    [
        ([13], 3, 2, 4),
        ([12], 3, 0, 4),  # no context
        ([13], 3, 3, 4),  # as much context as chunk
        ([9], 3, 2, 3),  # last chunk shorter than the context
        ([12, 1, 4, 13], 3, 2, 4),  # several shots, one of a single latent
        ([13], 3, 2, 1),  # one step
        ([4], 3, 2, 5),  # one chunk
        ([4], 1, 1, 12),  # fewer chunks than steps
    ],
)
def test_corner_cases_equal_the_recursion(make_film, shots, chunk_latents, context_latents, steps, rules):
    plan = make_film(shots, chunk_latents, context_latents)
    assert_equal(run(plan, steps, rules), plan, recursion(plan.chunks, steps, rules, True))


def test_sequential_equals_the_queue_where_there_is_no_context(make_film):
    plan = make_film([5, 3, 4], 9, 0)
    sequential = executor(4).run(sequential_schedule(plan.chunks, 4), plan)
    assert_equal(sequential, plan, recursion(plan.chunks, 4, SAME, True))


SCENES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=5)


@given(
    scenes=SCENES,
    context=st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b))),
    steps=st.integers(3, 6),
    rules=st.sampled_from(RULES),
    stages=st.integers(1, 3),
    forecast=st.frozensets(st.integers(1, 4), max_size=1),
)
@settings(deadline=None, max_examples=60)
def test_chunks_of_a_new_scene_read_how_the_one_before_ended(
    make_scenes, scenes, context, steps, rules, stages, forecast
):
    """Bit for bit, on any number of stages; and whole steps that are forecast are shared by none."""
    plan = make_scenes(scenes, *context)
    forecast = frozenset(k for k in forecast if k < steps - 1)
    rules = replace(rules, forecast=forecast, sharing=frozenset(sharing_steps(steps)) - forecast)
    simulate(queue_schedule(plan.chunks, steps, rules), plan.chunks, steps, rules)
    if not forecast:
        topology = Topology(stage=stages)
        finished, live = run_on_ranks(plan, steps, rules, topology, STAGES[stages])
        assert_equal(finished, plan, recursion(plan.chunks, steps, rules, True))
        assert not any(value for left in live for value in vars(left).values())


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    context=st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(1, b))),
    steps=st.integers(1, 5),
    rules=st.sampled_from(RULES),
    stages=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_a_film_goes_on_from_its_last_latents_which_are_clean(make_scenes, lengths, context, steps, rules, stages):
    """Also where it had ended before; its last chunk may be shorter than the context."""
    ends = tuple(sum(lengths[:count]) for count in range(1, len(lengths)))
    plan = make_scenes([(length, 0) for length in lengths], *context, ends)
    first = plan.chunks[plan.first_chunk]
    assert first.start == ends[-1] and first.num_left == min(context[1], ends[-1])
    shape = (SHAPE[0], first.num_left, *SHAPE[1:])
    recalled = torch.randint(PRIME, shape, generator=torch.Generator().manual_seed(9)).float()

    def schedule():
        return queue_schedule(plan.chunks, steps, rules, plan.first_chunk)

    report = simulate(schedule(), plan.chunks, steps, rules, plan.first_chunk)
    assert report.num_rounds == rules.num_rounds(len(plan.chunks) - plan.first_chunk, steps)
    topology = Topology(stage=stages)
    rehearse_schedule(schedule, topology, 1)
    finished, live = run_on_ranks(plan, steps, rules, topology, STAGES[stages], recalled=recalled)
    oracle = recursion(plan.chunks, steps, rules, True, plan.first_chunk, recalled.double().numpy())
    assert_equal(finished, plan, oracle)
    assert not any(value for left in live for value in vars(left).values())


@pytest.mark.parametrize("rules", [SAME, CACHED, replace(CACHED, gap=2)])
def test_sharing_takes_no_more_memory_in_a_longer_scene(make_scenes, rules):
    rules = replace(rules, sharing=frozenset(sharing_steps(6)))
    short, long = (peak_live_tensors(make_scenes([(9, 0), (n, n)], 2, 1), rules) for n in (40, 160))
    assert short == long
    alone = peak_live_tensors(make_scenes([(9, 0), (40, 0)], 2, 1), rules)
    assert 0 < short - alone <= LAYERS * len(rules.sharing)


@pytest.mark.parametrize("rules", [SAME, FRESHER, CACHED, replace(CACHED, gap=2)])
def test_live_state_does_not_grow_with_the_film(make_film, rules):
    short, long = (peak_live_tensors(make_film([n], 2, 1), rules) for n in (40, 160))
    assert short == long


def peak_live_tensors(plan, rules):
    """The most latents, velocities and K/V alive at once, seen from outside by weak references."""
    made, peak, stage = [], 0, ToyStage()

    class Watched(ToySolver):
        def step(self, velocity, step, sample):
            result = super().step(velocity, step, sample)
            made.extend([weakref.ref(velocity), weakref.ref(result)])
            return result

    class WatchedSampler(ToySampler):
        def new_solver(self):
            return Watched()

    def noise(chunk):
        result = toy_noise(chunk)
        made.append(weakref.ref(result))
        return result

    def count(_):
        nonlocal peak
        made[:] = [ref for ref in made if ref() is not None]
        stage.kv_alive[:] = [ref for ref in stage.kv_alive if ref() is not None]
        peak = max(peak, len(made) + len(stage.kv_alive))

    actions = queue_schedule(plan.chunks, 6, rules)
    for _ in executor(6, stage, WatchedSampler(6), noise).run(actions, plan, on_unit=count):
        pass
    count(None)
    assert not made
    assert not stage.kv_alive
    return peak


def test_closing_early_releases_everything_and_makes_no_more(make_film):
    plan, stage, drawn = make_film([30], 2, 1), ToyStage(), []

    def noise(chunk):
        result = toy_noise(chunk)
        drawn.append(weakref.ref(result))
        return result

    finished = executor(4, stage, noise=noise).run(queue_schedule(plan.chunks, 4, SAME), plan)
    next(finished)
    assert len(drawn) == 4
    finished.close()
    gc.collect()
    assert len(drawn) == 4
    assert not any(ref() is not None for ref in [*drawn, *stage.kv_alive])


def test_who_receives_latents_may_write_into_them(make_film):
    plan = make_film([13], 3, 2)
    oracle = recursion(plan.chunks, 4, FRESHER, True)
    for clip, expected in zip(run(plan, 4), oracle, strict=True):
        assert np.array_equal(clip.latents.numpy(), expected)
        clip.latents.zero_()


def test_the_grad_mode_of_the_caller_is_left_alone(make_film):
    for _ in run(make_film([6], 2, 1), 2):
        assert torch.is_grad_enabled()


def test_progress_is_called_once_a_unit_in_order(make_film):
    plan, seen = make_film([8], 2, 1), []
    actions = list(queue_schedule(plan.chunks, 3, SAME))
    list(executor(3).run(actions, plan, on_unit=seen.append))
    assert seen == [action for action in actions if isinstance(action, Step)]


class BrokenStage(ToyStage):
    """Predicts one infinite value at chunk 2, step 1."""

    def forward(self, unit):
        prediction = super().forward(unit)
        if (unit.chunk.index, unit.step) == (2, 1):
            prediction.velocity[0, 0, 0, 0, 0] = float("inf")
        return prediction


def test_latents_that_are_not_finite_stop_the_run_and_are_named(make_film):
    plan = make_film([3, 7], 2, 1)  # chunks of 3, 3, 2 and 2 latents; the second shot starts at frame 9
    finished = run(plan, 3, stage=BrokenStage())
    message = r"latents of chunk 2 are not finite after step 2 of 3 \(shot 1, frames 18-25\)"
    with pytest.raises(RuntimeFailure, match=message):
        list(finished)


class InPlaceSolver(ToySolver):
    def step(self, velocity, _, sample):
        return sample.add_(velocity)


def test_a_solver_that_works_in_place_is_refused(make_film):
    sampler = ToySampler(2)
    sampler.new_solver = InPlaceSolver
    plan = make_film([3], 2, 1)
    with pytest.raises(AssertionError, match="leave its sample"):
        list(executor(2, sampler=sampler).run(queue_schedule(plan.chunks, 2, SAME), plan))


# ---------------------------------------------------------------------------------------------------------- many ranks


class ThreadComm:
    """The way between executors in threads of one process, with a random delay for every message."""

    def __init__(self, rank, boxes, seed):
        self.rank, self.boxes, self.random = rank, boxes, random.Random(f"{seed}:{rank}")

    def send(self, header, payload, to, *, window=0, is_sized=False):
        time.sleep(self.random.choice([0, 0, 1e-4, 2e-3]))
        self.boxes[self.rank, to].put((header, payload.clone()))

    def receive(self, source, shape, dtype, *, is_sized=False, on_host=False):
        return ThreadIncoming(self.boxes[source, self.rank], None if is_sized else tuple(shape), dtype)

    def flush(self):
        pass


class ThreadIncoming:
    def __init__(self, box, shape, dtype):
        self.box, self.shape, self.dtype = box, shape, dtype

    def wait(self):
        header, payload = self.box.get(timeout=120)
        assert payload.dtype == self.dtype and self.shape in (None, tuple(payload.shape))
        return header, payload


class ToyDecoder:
    """A frame a latent: the digest of all latents of the shot so far. Its state is that digest."""

    keeps_endings = True

    def __init__(self):
        self.states, self.kept = {}, {}

    def decode(self, film, chunk, latents, values):
        assert values.shape[1] == len(latents)
        digest = self.states.pop(film, 0) if chunk.start + latents.start else 0
        frames = []
        for latent in values.unbind(1):
            digest = (31 * digest + int(latent.sum())) % 251
            frames.append(torch.full((1, 2, 2, 3), digest, dtype=torch.uint8))
        self.states[film] = digest
        return torch.cat(frames)

    def packed(self, film):
        return torch.tensor([self.states[film]], dtype=torch.uint8)

    def forget(self, film):
        del self.states[film]

    def go_on(self, film, packed):
        assert film not in self.states
        self.states[film] = int(packed)

    def keep(self, film, packed):
        self.kept[film] = int(packed)


class SaveOrder:
    """A saver that is due after one round, and holds the executor to the order of what is saved."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def is_due(self, done):
        return done == self.at

    def save_kv(self, done, kv):
        assert not self.calls
        self.calls.append(("kv", done))

    def save_latents(self, done, latents, solvers):
        assert self.calls == [("kv", done)]
        self.calls.append(("latents", done))

    def save_films(self, done):
        assert self.calls == [("kv", done), ("latents", done)]
        self.calls.append(("films", done))


def assert_decoded(finished, plan):
    decoder = ToyDecoder()
    for chunk in finished:
        whole = decoder.decode(0, chunk.chunk, range(chunk.chunk.num_latents), chunk.latents)
        assert torch.equal(chunk.frames, whole)


def run_on_ranks(
    plan, steps, rules, topology, bounds, seed=0, make_cache=lambda rank: None, recalled=None, decoding=None
):
    """The leader's finished chunks, and what is still alive on every rank in the end."""
    boxes = defaultdict(queue.SimpleQueue)
    alone = Group((0,), 0)

    def run_rank(rank):
        place = topology.coordinate(rank)
        mesh = Mesh(topology, rank, ThreadComm(rank, boxes, seed), alone, alone, alone)
        live = Live()
        toy = replace(executor(steps, ToyStage(bounds[place.stage])), mesh=mesh, guidance=3.0, cache=make_cache(rank))
        if toy.cache:
            toy.sampler = ForecastingSampler(steps)
        toy.decoding, toy.decoder = decoding, ToyDecoder()
        toy.recalled = recalled if place.stage == 0 else None
        toy.saver = SaveOrder(seed % 12)
        finished = list(toy.run(queue_schedule(plan.chunks, steps, rules, plan.first_chunk), plan, live=live))
        assert not toy.decoder.states, "a state stays where nobody needs it"
        assert rank or len(toy.saver.calls) in (0, 3)
        if decoding and rank == 0:
            assert toy.decoder.kept == {0: int(finished[-1].frames[-1, 0, 0, 0])}
        return finished, live

    with ThreadPoolExecutor(topology.num_ranks) as pool:
        results = list(pool.map(run_rank, range(topology.num_ranks)))
    assert all(box.empty() for box in boxes.values())
    assert not any(finished for finished, _ in results[1:])
    return results[0][0], [live for _, live in results]


STAGES = {1: [range(4)], 2: [range(1), range(1, 4)], 3: [range(2), range(2, 3), range(3, 4)]}
STAGES[4] = [range(i, i + 1) for i in range(4)]


@given(
    shots=st.lists(st.integers(1, 11), min_size=1, max_size=2),
    context=st.integers(1, 3).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, b))),
    steps=st.integers(1, 5),
    rules=st.sampled_from(RULES),
    stages=st.integers(1, 4),
    guidance=st.sampled_from([1, 1, 2]),
    decode=st.none() | st.lists(st.integers(0, 3), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_every_mesh_equals_the_recursion_bit_for_bit(
    make_film, shots, context, steps, rules, stages, guidance, decode, seed
):
    """Both branches of the toy predict the same, so guidance between them changes nothing that is whole."""
    plan = make_film(shots, *context)
    topology, decoding = Topology(stage=stages, guidance=guidance), None
    if decode:
        parts = [part + (stage == seed % stages) for stage, part in enumerate(decode[:stages])]
        shares = Shares(tuple(part / sum(parts) for part in parts))
        decoding = StageDecoding(Decoding.of(shares, plan, rules, steps))
    rehearse_schedule(lambda: queue_schedule(plan.chunks, steps, rules), topology, 1, decoding=decoding)
    finished, live = run_on_ranks(plan, steps, rules, topology, STAGES[stages], seed, decoding=decoding)
    if decoding:
        assert_decoded(finished, plan)
    assert_equal(finished, plan, recursion(plan.chunks, steps, rules, True))
    assert not any(value for left in live for value in vars(left).values())


@pytest.mark.parametrize("due", range(10))
def test_a_save_is_whole_or_not_at_all_whatever_round_it_is_of(make_film, due):
    """The last round has nothing to save, though the leader may have asked for it."""
    plan, steps, rules = make_film([11], 2, 1), 4, RULES[0]
    decoding = StageDecoding(Decoding.of(Shares((0.5, 0.5)), plan, rules, steps))
    run_on_ranks(plan, steps, rules, Topology(stage=2), STAGES[2], due, decoding=decoding)


class ForecastingSolver(ToySolver):
    """Its forecast is the velocity before, and one more."""

    def forecast(self, step):
        return (torch.as_tensor(self.previous) + 1) % PRIME

    def learn_negative(self, velocity, step, sample):
        pass

    def negative(self, step, sample):
        raise AssertionError("every step has the negative's pass")

    def state(self):
        return {}

    def load_state(self, state):
        pass


class ForecastingSampler(ToySampler):
    def new_solver(self):
        return ForecastingSolver()


class Coin(CacheRuntime):
    """A gate that every rank would answer in its own way; so what is common to all is what the leader said."""

    def __init__(self, plan, rank, coins):
        super().__init__(plan)
        self.rank, self.coins = rank, coins

    def judge(self, chunk, step, probe):
        return torch.tensor(float(step))

    def decide(self, chunk, sums):
        return self.coins[self.rank][(7 * chunk + int(sums)) % len(self.coins[self.rank])]


@given(
    shots=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    context=st.integers(1, 3).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, b))),
    steps=st.integers(3, 7),
    rules=st.sampled_from(RULES),
    stages=st.integers(1, 4),
    guidance=st.sampled_from([1, 1, 2]),
    coins=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_all_ranks_follow_the_leaders_gate(make_film, shots, context, steps, rules, stages, guidance, coins, seed):
    """Whatever it says and whenever messages come, no rank waits for ever, and the film is that of one rank."""
    plan, topology = make_film(shots, *context), Topology(stage=stages, guidance=guidance)
    gated = tuple(StepPlan("gated" if 0 < k < steps - 1 else "computed") for k in range(steps))
    cache = CachePlan(gated, gate=GateRules(1, 0.5, 0))
    rules = replace(rules, gated=frozenset(range(1, steps - 1)))
    report = simulate(queue_schedule(plan.chunks, steps, rules), plan.chunks, steps, rules)
    assert report.num_units == len(plan.chunks) * steps
    rehearse_schedule(lambda: queue_schedule(plan.chunks, steps, rules), topology, 1)

    def on(topology, stages):
        def coin(rank):
            return Coin(cache, rank, coins)

        return run_on_ranks(plan, steps, rules, topology, STAGES[stages], seed, coin)

    finished, live = on(topology, stages)
    alone, _ = on(Topology(), 1)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(finished, alone, strict=True))
    assert len(finished) == len(plan.chunks)
    for left in live:
        left.left_out.clear()  # flags of the last steps
        assert not any(vars(left).values())


def test_a_message_of_another_unit_is_refused(make_film):
    plan, boxes = make_film([6], 3, 1), defaultdict(queue.SimpleQueue)
    alone, topology = Group((0,), 0), Topology(stage=2)
    boxes[0, 1].put((Header(chunk=1, step=0), torch.zeros(1, 16, 1)))
    mesh = Mesh(topology, 1, ThreadComm(1, boxes, 0), alone, alone, alone)
    last = replace(executor(2, ToyStage(range(2, 4))), mesh=mesh)
    with pytest.raises(RuntimeFailure, match="hidden c0 k0 was due from rank 0, but c1 k0 came"):
        list(last.run(queue_schedule(plan.chunks, 2, FRESHER), plan))
