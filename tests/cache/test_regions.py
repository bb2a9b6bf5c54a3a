"""Tokens that are left out: who is chosen, what is kept for the others, and how the later stages are told."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.cache.plan import CachePlan, RegionRules, StepPlan
from longvid.cache.regions import Active, RegionMemory, num_active
from longvid.cache.runtime import CacheRuntime
from longvid.cache.settings import RegionAdaptive

HIGH, LOW = RegionRules("high", 0.0), RegionRules("low", 0.0)


def seen_twice(memory, changes, share, num_tokens=None):
    """Show latents that change by `changes` [O, P] from one step to the next; who is active in the second."""
    start = torch.randn(changes.shape, generator=torch.Generator().manual_seed(1))
    assert memory.choose(0, (0,), share, start, num_tokens or len(changes)) is None, "nothing is known yet"
    return memory.choose(0, (0,), share, start + changes, num_tokens or len(changes))


def test_tokens_are_chosen_by_the_deviation_of_what_changed():
    scale = torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0, 0.5])
    changes = scale[:, None] * torch.tensor([1.0, -1.0, 0.5, -0.5]) + 7  # the mean says nothing
    assert seen_twice(RegionMemory(HIGH), changes, 0.5).own.tolist() == [0, 2, 4]
    assert seen_twice(RegionMemory(LOW), changes, 0.5).own.tolist() == [1, 3, 5]
    with_context = seen_twice(RegionMemory(HIGH), changes, 0.5, num_tokens=9)
    assert with_context.tokens.tolist() == [0, 1, 2, 3, 5, 7] and with_context.own.tolist() == [0, 2, 4]


@given(st.sampled_from(["low", "high"]), st.integers(2, 30), st.integers(0, 1000))
def test_nobody_starves(focus, count, seed):
    memory, generator = RegionMemory(RegionRules(focus, 0.5)), torch.Generator().manual_seed(seed)
    latents, scale = torch.zeros(count, 4), torch.rand(count, 1, generator=generator) + 0.2
    come = torch.zeros(count)
    for _ in range(40):
        latents = latents + scale * torch.randn(count, 4, generator=generator)
        if active := memory.choose(0, (0,), 0.3, latents, count):
            assert len(active.own) == num_active(0.3, count)
            come[active.own] += 1
    assert (come > 0).all()


@given(st.integers(1, 40), st.integers(0, 20), st.integers(1, 16), st.floats(0.05, 1), st.randoms())
def test_later_stages_hear_who_is_active(num_own, num_left, width, share, random):
    count, num_tokens = num_active(share, num_own), num_own + num_left
    own = torch.tensor(sorted(random.sample(range(num_own), count)))
    active = Active(torch.cat([torch.arange(num_left), num_left + own]), num_tokens, num_own)
    rows = active.as_rows(torch.zeros(1, 3, width, dtype=torch.bfloat16))
    other = Active.from_rows(rows, num_tokens, num_own)
    assert torch.equal(other.tokens, active.tokens) and torch.equal(other.own, own)
    runtime = CacheRuntime(CachePlan((StepPlan(active=share),), regions=HIGH))
    expected = num_tokens if share == 1 else len(active.tokens) + rows.shape[1]
    assert runtime.num_rows(num_tokens, num_own, width, 0) == expected


def test_what_was_left_out_keeps_its_kv_and_velocity():
    memory, place = RegionMemory(HIGH), (3, 0, 1)
    whole = [torch.arange(5.0).view(1, 5, 1, 1), -torch.arange(5.0).view(1, 5, 1, 1)]
    assert all(torch.equal(a, b) for a, b in zip(memory.kv(place, *whole, None), whole, strict=True))
    memory.velocity(place, torch.arange(3.0).view(1, 3, 1), None)
    active = Active(torch.tensor([0, 1, 3]), 5, 3)  # two of left context, and the own token 1
    key, value = memory.kv(place, torch.full((1, 3, 1, 1), 9.0), torch.full((1, 3, 1, 1), 8.0), active)
    assert key.flatten().tolist() == [9, 9, 2, 9, 4] and value.flatten().tolist() == [8, 8, -2, 8, -4]
    assert memory.velocity(place, torch.full((1, 1, 1), 7.0), active).flatten().tolist() == [0, 7, 2]
    resumed = RegionMemory(HIGH)
    resumed.load_state(memory.state())
    assert resumed.velocity(place, torch.full((1, 1, 1), 6.0), active).flatten().tolist() == [0, 6, 2]
    memory.forget(3)
    assert memory.num_bytes == 0 < resumed.num_bytes


def test_the_first_the_last_and_every_nth_step_are_whole():
    steps = RegionAdaptive(policy="ras", ratio=0.25, first_steps=2, reset_every=3).plan(10, 4).steps
    assert [step.active for step in steps] == [1, 1, 0.25, 0.25, 1, 0.25, 0.25, 1, 0.25, 1]
