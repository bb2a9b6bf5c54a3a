"""The executor against a brute-force recursion over (chunk, step), bit for bit, and the bounds on what it keeps.

The toy arithmetic is whole numbers modulo a prime below 2^8: exact in float32 and in float64, while any wrong
value, position, timestep or solver history that is read gives other numbers.
"""

import gc
import weakref
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.errors import RuntimeFailure
from longvid.geometry import LatentGrid
from longvid.parallel.executor import Executor, Prediction
from longvid.parallel.schedule import Step, queue_schedule, sequential_schedule
from longvid.plan import ModelFacts

PRIME = 251
SHAPE = (2, 2, 1)  # channels, height, width


def mix(inputs, times, right, step):
    """What the toy layers make of inputs [C, F, h, w], timesteps [F] and right K/V [C, R, h, w] or None, in float64."""
    frames, times = np.arange(1, inputs.shape[1] + 1).reshape(1, -1, 1, 1), times.reshape(1, -1, 1, 1)
    total = (frames * (inputs + times)).sum(axis=1, keepdims=True)
    if right is not None:
        total = total + 7 * (np.arange(1, right.shape[1] + 1).reshape(1, -1, 1, 1) * right).sum(axis=1, keepdims=True)
    return (inputs * inputs + 3 * total + 5 * frames * times + 11 * step) % PRIME


class ToyStage:
    """Its K/V are what the layers made, so they carry on all that the unit read, its own right context too."""

    def __init__(self):
        self.kv_alive = []

    def forward(self, unit):
        assert unit.latents.dtype == unit.timesteps.dtype == torch.float32
        assert unit.latents.shape[1] == len(unit.timesteps) == unit.chunk.num_left + unit.chunk.num_latents
        right = None if unit.right is None else unit.right.double().numpy()
        mixed = mix(unit.latents.double().numpy(), unit.timesteps.double().numpy(), right, unit.step)
        mixed = torch.from_numpy(mixed).float()
        kv = None if unit.store_kv is None else mixed[:, unit.store_kv].clone()
        if kv is not None:
            self.kv_alive.append(weakref.ref(kv))
        return Prediction(mixed[:, unit.chunk.num_left :], kv)


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


def recursion(chunks, steps, level, per_token):
    """Finished latents of every chunk, straight from the semantics: a value is defined by the values that it reads."""
    time = ToySampler(steps).timestep

    @cache
    def latents(i, k):
        if k == 0:
            return toy_noise(chunks[i]).numpy().astype(np.float64)
        velocity = layers(i, k - 1)[:, chunks[i].num_left :]
        before = layers(i, k - 2)[:, chunks[i].num_left :] if k > 1 else 0
        return (latents(i, k - 1) + velocity + 2 * before + k - 1) % PRIME

    @cache
    def layers(i, k):
        own, times = latents(i, k), [time(k)] * chunks[i].num_latents
        if chunks[i].num_left:
            level_of_left = k if level == "same" else min(k + 1, steps)
            own = np.concatenate([latents(i - 1, level_of_left)[:, -chunks[i].num_left :], own], axis=1)
            times = [time(level_of_left if per_token else k)] * chunks[i].num_left + times
        right = None
        if chunks[i].num_right and k >= 1:
            newer = chunks[i + 1]
            right = layers(i + 1, k - 1)[:, newer.num_left : newer.num_left + chunks[i].num_right]
        return mix(own, np.array(times), right, k)

    return [latents(i, steps) for i in range(len(chunks))]


def executor(steps, stage=None, sampler=None, noise=toy_noise, per_token=True):
    facts = ModelFacts("toy", "toy", LatentGrid(), 2, 1, 24.0, 16, 16, per_token_timesteps=per_token, max_latents=64)
    return Executor(stage or ToyStage(), sampler or ToySampler(steps), noise, facts)


def run(plan, steps, level="fresher", stage=None, per_token=True):
    actions = queue_schedule(plan.chunks, steps, level)
    return executor(steps, stage, per_token=per_token).run(actions, plan)


def assert_equal(finished, plan, oracle):
    finished = list(finished)
    assert [clip.chunk for clip in finished] == list(plan.chunks)
    for clip, expected in zip(finished, oracle, strict=True):
        assert clip.latents.dtype == torch.float32
        assert np.array_equal(clip.latents.numpy(), expected)


@given(
    shots=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    context=st.integers(1, 4).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, b))),
    steps=st.integers(1, 5),
    level=st.sampled_from(["same", "fresher"]),
    per_token=st.booleans(),
)
@settings(deadline=None)
def test_the_queue_equals_the_recursion_bit_for_bit(make_film, shots, context, steps, level, per_token):
    plan = make_film(shots, *context)
    finished = run(plan, steps, level, per_token=per_token)
    assert_equal(finished, plan, recursion(plan.chunks, steps, level, per_token))


@pytest.mark.parametrize("level", ["same", "fresher"])
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
def test_corner_cases_equal_the_recursion(make_film, shots, chunk_latents, context_latents, steps, level):
    plan = make_film(shots, chunk_latents, context_latents)
    assert_equal(run(plan, steps, level), plan, recursion(plan.chunks, steps, level, True))


def test_sequential_equals_the_queue_where_there_is_no_context(make_film):
    plan = make_film([5, 3, 4], 9, 0)
    sequential = executor(4).run(sequential_schedule(plan.chunks, 4), plan)
    assert_equal(sequential, plan, recursion(plan.chunks, 4, "same", True))


@pytest.mark.parametrize("level", ["same", "fresher"])
def test_live_state_does_not_grow_with_the_film(make_film, level):
    short, long = (peak_live_tensors(make_film([n], 2, 1), level) for n in (40, 160))
    assert short == long


def peak_live_tensors(plan, level):
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

    actions = queue_schedule(plan.chunks, 6, level)
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

    finished = executor(4, stage, noise=noise).run(queue_schedule(plan.chunks, 4, "same"), plan)
    next(finished)
    assert len(drawn) == 4
    finished.close()
    gc.collect()
    assert len(drawn) == 4
    assert not any(ref() is not None for ref in [*drawn, *stage.kv_alive])


def test_who_receives_latents_may_write_into_them(make_film):
    plan = make_film([13], 3, 2)
    oracle = recursion(plan.chunks, 4, "fresher", True)
    for clip, expected in zip(run(plan, 4), oracle, strict=True):
        assert np.array_equal(clip.latents.numpy(), expected)
        clip.latents.zero_()


def test_the_grad_mode_of_the_caller_is_left_alone(make_film):
    for _ in run(make_film([6], 2, 1), 2):
        assert torch.is_grad_enabled()


def test_progress_is_called_once_a_unit_in_order(make_film):
    plan, seen = make_film([8], 2, 1), []
    actions = list(queue_schedule(plan.chunks, 3, "same"))
    list(executor(3).run(actions, plan, on_unit=seen.append))
    assert seen == [action for action in actions if isinstance(action, Step)]


class BrokenStage(ToyStage):
    """Predicts one infinite value at chunk 2, step 1."""

    def forward(self, unit):
        prediction = super().forward(unit)
        if (unit.chunk.index, unit.step) == (2, 1):
            prediction.velocity[0, 0, 0, 0] = float("inf")
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
        list(executor(2, sampler=sampler).run(queue_schedule(plan.chunks, 2, "same"), plan))
