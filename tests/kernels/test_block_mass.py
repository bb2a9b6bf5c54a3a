"""Block mass is the oracle's, whoever computes it."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.kernels import cpu, native, reference, score
from longvid.kernels.layout import Blocks, even_blocks

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if native.is_available() else ()
COMPUTE = {
    "torch": score.block_mass_torch,
    **{name: functools.partial(cpu.block_mass, isa=name) for name in ISAS},
    "dispatched": score.block_mass,
}
computes = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)


def random(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(seed, batch, num_queries, num_keys, num_heads, dim):
    q, k = random(seed, batch, num_queries, num_heads, dim), random(seed + 1, batch, num_keys, num_heads, dim)
    scores = torch.einsum("blhd,bthd->blht", q.double(), k.double()) / math.sqrt(dim)
    return q, k, scores.logsumexp(-1).float()


def sampled_mass(q, k, lse, q_blocks, k_blocks, every):
    """The oracle on the sampled queries of each block, scaled up."""
    rows = []
    offsets = q_blocks.offsets[0].tolist()
    order = torch.arange(q.shape[1]) if q_blocks.order is None else q_blocks.order[0].long()
    for start, stop in itertools.pairwise(offsets):
        tokens = order[start:stop:every]
        one = Blocks(torch.tensor([[0, len(tokens)]], dtype=torch.int32))
        mass = reference.block_mass(q[:, tokens], k, lse[:, tokens], one, k_blocks)
        rows.append(mass * ((stop - start) / max(1, len(tokens))))
    return torch.cat(rows, 2)


@computes
@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 2),
    tokens=st.tuples(st.integers(1, 300), st.integers(1, 80)),
    blocks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dim=st.sampled_from([1, 16, 40, 64]),
    ordered=st.booleans(),
    every=st.sampled_from([1, 2, 4, 7]),
)
def test_it_is_the_oracle(compute, random_blocks, seed, batch, tokens, blocks, dim, ordered, every):
    q, k, lse = case(seed, batch, *tokens, 2, dim)
    generator = torch.Generator().manual_seed(seed)
    q_blocks, k_blocks = (
        random_blocks(generator, n, count, 1, ordered=ordered) for n, count in zip(tokens, blocks, strict=True)
    )
    found = compute(q, k, lse, q_blocks, k_blocks, scale=1 / math.sqrt(dim), sample_every=every)
    assert found.dtype == torch.float32
    expected = sampled_mass(q, k, lse, q_blocks, k_blocks, every)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5)
    if every == 1:
        torch.testing.assert_close(expected, reference.block_mass(q, k, lse, q_blocks, k_blocks))


@computes
def test_each_row_pays_as_much_as_it_has_queries(compute):
    q, k, lse = case(1, 1, 100, 130, 2, 32)
    mass = compute(q, k, lse, even_blocks(100, 32), even_blocks(130, 16), scale=1 / math.sqrt(32))
    torch.testing.assert_close(mass.sum(-1), torch.tensor([32.0, 32, 32, 4]).expand(1, 2, -1), rtol=1e-5, atol=1e-5)


@computes
def test_a_stale_lse_may_be_far_from_the_scores(compute):
    q, k, lse = case(1, 1, 20, 40, 1, 16)
    blocks = even_blocks(20, 8), even_blocks(40, 8)
    for shift in (-50.0, 50.0):
        found = compute(q, k, lse + shift, *blocks, scale=0.25)
        torch.testing.assert_close(found.double(), reference.block_mass(q, k, lse + shift, *blocks), rtol=1e-4, atol=0)
    assert (compute(q, k, lse - 1000, *blocks, scale=0.25) == math.inf).all()
    assert not compute(q, k, lse + 1000, *blocks, scale=0.25).any()


@computes
def test_queries_that_saw_no_key_pay_nothing(compute):
    q, k, lse = case(1, 1, 20, 40, 1, 16)
    lse[:, 3:12] = -math.inf
    found = compute(q, k, lse, even_blocks(20, 1), even_blocks(40, 8), scale=0.25)
    assert not found[:, :, 3:12].any() and found[:, :, :3].all() and found[:, :, 12:].all()


@computes
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_shows(compute, which):
    x = list(case(1, 1, 20, 40, 1, 16))
    x[which][0, 9] = math.nan
    mass = compute(*x, even_blocks(20, 8), even_blocks(40, 8), scale=0.25)[0, 0].isnan()
    expected = torch.zeros(3, 5, dtype=torch.bool)
    expected[(slice(None), 1) if which == 1 else 1] = True
    assert torch.equal(mass, expected)


def test_slabs_bound_the_memory_of_the_fallback(monkeypatch):
    q, k, lse = case(1, 2, 50, 40, 2, 16)
    blocks = even_blocks(50, 8), even_blocks(40, 8)
    whole = score.block_mass_torch(q, k, lse, *blocks, scale=0.25)
    monkeypatch.setattr(score, "SLAB_SCORES", 1000)
    torch.testing.assert_close(score.block_mass_torch(q, k, lse, *blocks, scale=0.25), whole)


def test_mass_that_need_not_be_exact_is_near():
    q, k, lse = case(3, 1, 200, 300, 2, 64)
    blocks = even_blocks(200, 32), even_blocks(300, 32)
    exact = score.block_mass(q, k, lse, *blocks)
    torch.testing.assert_close(score.block_mass(q, k, lse, *blocks, exact=False), exact, rtol=0.02, atol=0)


def test_no_tokens_have_no_mass():
    q, k, lse = torch.zeros(1, 0, 2, 8), torch.zeros(1, 16, 2, 8), torch.zeros(1, 0, 2)
    empty = Blocks(torch.zeros(1, 2, dtype=torch.int32))
    assert not score.block_mass(q, k, lse, empty, even_blocks(16, 8)).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"k_BTHD": torch.zeros(1, 40, 3, 16)},
        {"q_BLHD": torch.zeros(20, 1, 16)},
        {"lse_BLH": torch.zeros(1, 21, 1)},
        {"q_blocks": even_blocks(21, 8)},
        {"k_blocks": Blocks(torch.tensor([[0, 40], [0, 40]], dtype=torch.int32))},
        {"k_blocks": Blocks(torch.tensor([[0, 40]], dtype=torch.int32), torch.zeros(1, 39, dtype=torch.int32))},
        {"sample_every": 0},
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    q, k, lse = case(1, 1, 20, 40, 1, 16)
    right = {"q_BLHD": q, "k_BTHD": k, "lse_BLH": lse, "q_blocks": even_blocks(20, 8), "k_blocks": even_blocks(40, 8)}
    score.block_mass(**right)
    with pytest.raises(ValueError, match=r"must|blocks"):
        score.block_mass(**(right | wrong))
