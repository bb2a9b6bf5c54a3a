"""Triton kernels against their oracles, in Triton's interpreter: `test_triton.py` runs this file in its own process.

TRITON_INTERPRET is read when a kernel is defined. The interpreter's bf16 products are wrong, so fp32 and fp16 are here.
"""

import math

import pytest
import torch

from longvid.kernels import block_sparse, mass, pool, pool_triton, reference, select, select_triton
from longvid.kernels.layout import Blocks, even_blocks, make_layout, one_group

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


def ragged_blocks(num_tokens, num_blocks, *, offsets=1, orders=0, seed=0):
    """Blocks of any lengths, some of them 0, of so many groups; no orders: tokens in their own."""
    rng = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, num_tokens + 1, (offsets, num_blocks - 1), generator=rng).sort(-1).values
    cuts[:, 1] = cuts[:, 0]
    edges = torch.cat([torch.zeros(offsets, 1), cuts.sort(-1).values, torch.full((offsets, 1), num_tokens)], 1)
    order = [torch.randperm(num_tokens, generator=rng) for _ in range(orders)]
    return Blocks(edges.int(), torch.stack(order).int() if orders else None)


def random_inputs(batch, num_queries, num_keys, num_heads, head_dim, dtype):
    torch.manual_seed(0)
    return [torch.randn(batch, n, num_heads, head_dim).to(dtype) for n in (num_queries, num_keys, num_keys)]


def random_layout(q, k, num_groups, batch, num_heads, density=0.5):
    torch.manual_seed(1)
    mask = torch.rand(num_groups, q.num_blocks, k.num_blocks) < density
    mask[0, 0] = False
    group = torch.randint(0, num_groups, (batch, num_heads))
    group[0, -1] = -1
    return make_layout(q, k, mask, group)


def assert_attends(q, k, v, layout, bias=None, scale=0.3, loads="pointers"):
    out, lse = block_sparse.forward(q, k, v, layout, scale, bias, loads)
    expected_out, expected_lse = reference.sparse_attention(q, k, v, layout, scale=scale, k_bias=bias)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("offsets", "orders"), [(1, 0), (1, 1), (3, 0), (3, 3), (1, 3), (3, 1)])
def test_ragged_blocks_of_groups_with_orders_of_their_own(dtype, offsets, orders):
    blocks = {"offsets": offsets, "orders": orders}
    layout = random_layout(ragged_blocks(90, 5, **blocks), ragged_blocks(75, 6, seed=1, **blocks), 3, 2, 2)
    assert_attends(*random_inputs(2, 90, 75, 2, 16, dtype), layout)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 256])
def test_head_dims_are_padded(head_dim):
    layout = random_layout(even_blocks(40, 16), even_blocks(48, 16), 2, 1, 2)
    assert_attends(*random_inputs(1, 40, 48, 2, head_dim, torch.float16), layout, scale=0.1)


@pytest.mark.parametrize("ordered", [False, True], ids=["contiguous", "gathered"])
@pytest.mark.parametrize(
    ("size", "num_keys"), [(16, 64), (64, 192), (64, 130), (48, 100), (20, 70), (128, 128), (128, 192)]
)
def test_blocks_of_one_size_with_and_without_a_shorter_last_one(size, num_keys, ordered, monkeypatch):
    q, k = even_blocks(100, size), even_blocks(num_keys, size)
    if ordered:
        q, k = (Blocks(x.offsets, torch.randperm(n)[None].int(), x.size) for x, n in ((q, 100), (k, num_keys)))
    inputs, layout = random_inputs(1, 100, num_keys, 2, 16, torch.float16), random_layout(q, k, 2, 1, 2)
    assert_attends(*inputs, layout)
    if size in (64, 128) and not ordered:
        described = []
        describe = block_sparse.describe
        monkeypatch.setattr(block_sparse, "describe", lambda *args: described.append(args) or describe(*args))
        assert_attends(*inputs, layout, loads="descriptors")
        assert len(described) == 2


def test_descriptors_serve_tensors_that_the_copy_engine_can_read():
    fits = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16)
    assert block_sparse.suits_descriptors(fits)
    for x in (fits.float(), fits[..., :40], fits[..., :40].contiguous(), fits.flatten()[1:513].view(1, 4, 2, 64)):
        assert not block_sparse.suits_descriptors(fits, x)


@pytest.mark.parametrize("shape", [(2, 3, 70), (1, 1, 70), (2, 1, 70), (1, 3, 70)])
@pytest.mark.parametrize("size", [16, None], ids=["even", "ragged"])
def test_bias_broadcasts_and_hides_columns(shape, size):
    k = even_blocks(70, size) if size else ragged_blocks(70, 5, orders=1)
    bias = torch.randn(shape)
    bias[..., :40:2] = -math.inf
    bias[0, 0, :32] = -math.inf  # whole tiles come before the first visible key
    assert_attends(
        *random_inputs(2, 33, 70, 3, 16, torch.float32), random_layout(even_blocks(33, 16), k, 2, 2, 3), bias
    )


def test_rows_whose_keys_are_all_hidden_have_seen_nothing():
    q, k, v = random_inputs(1, 32, 32, 1, 16, torch.float32)
    layout = make_layout(even_blocks(32, 16), even_blocks(32, 16), torch.ones(1, 2, 2, dtype=torch.bool), one_group(1))
    out, lse = block_sparse.forward(q, k, v, layout, 0.25, torch.full((1, 1, 32), -math.inf))
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_shows_in_the_rows_that_read_it_and_in_no_others(where):
    tensors = dict(zip("qkv", random_inputs(1, 48, 48, 1, 16, torch.float32), strict=True))
    tensors[where][0, 20] = math.nan
    blocks = Blocks(torch.tensor([[0, 15, 40, 48]], dtype=torch.int32))
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0], [1, 1, 0]]], dtype=torch.bool)
    layout = make_layout(blocks, blocks, mask, one_group(1))
    out, _ = block_sparse.forward(*tensors.values(), layout, 0.25, None)
    rows = {"q": [20], "k": range(15, 48), "v": range(15, 48)}[where]
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == list(rows)


def test_strided_inputs():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(2, 40, 50, 3, 16, torch.float32))
    assert not q.is_contiguous()
    layout = random_layout(ragged_blocks(40, 3, orders=1), even_blocks(50, 16), 2, 2, 3)
    assert_attends(q, k.mT.contiguous().mT, v, layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sample_every", [1, 3])
def test_block_mass_of_all_or_some_queries(dtype, sample_every):
    q, k, _ = random_inputs(2, 90, 50, 2, 24, dtype)
    q_blocks, k_blocks = ragged_blocks(90, 4, orders=1), ragged_blocks(50, 4, seed=2)
    lse = torch.einsum("blhd,bthd->blht", q.float(), k.float()).mul(0.2).logsumexp(-1)
    found = mass.block_mass(q, k, lse, q_blocks, k_blocks, scale=0.2, sample_every=sample_every)
    places = [torch.arange(a, b) for a, b in zip(q_blocks.offsets[0, :-1], q_blocks.offsets[0, 1:], strict=True)]
    seen = torch.cat([q_blocks.order[0].long()[place[::sample_every]] for place in places])
    hidden = torch.full_like(lse, math.inf)
    hidden[:, seen] = lse[:, seen]
    expected = reference.block_mass(q, k, hidden, q_blocks, k_blocks, scale=0.2)
    share = torch.tensor([len(place) / max(1, len(place[::sample_every])) for place in places])
    torch.testing.assert_close(found.double(), expected * share[:, None].double(), rtol=1e-3, atol=1e-4)


def test_block_mass_of_queries_that_saw_nothing_is_nothing():
    q, k, _ = random_inputs(1, 16, 16, 1, 16, torch.float32)
    lse = torch.full((1, 16, 1), -math.inf)
    assert (mass.block_mass(q, k, lse, even_blocks(16, 8), even_blocks(16, 8), scale=1.0) == 0).all()


@pytest.mark.parametrize(("offsets", "orders"), [(1, 0), (1, 4), (4, 1), (4, 4)])
def test_pool(offsets, orders):
    x = random_inputs(2, 80, 1, 2, 24, torch.float32)[0]
    blocks = ragged_blocks(80, 5, offsets=offsets, orders=orders)
    for found, expected in zip(pool_triton.pool(x, blocks), pool.pool_torch(x, blocks), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_select_with_ties_and_infinities(columns):
    rng = torch.Generator().manual_seed(columns)
    weights = torch.randint(0, 6, (3, 4, columns), generator=rng).float()
    weights[1, 1] = 0.0
    scores = weights - 3
    scores[0, 0, ::3], scores[0, 1, ::2], scores[0, 2] = math.inf, -math.inf, -0.0
    count = torch.randint(0, columns + 3, (3, 4), generator=rng)
    assert torch.equal(select_triton.top_k(scores, count), select.top_k(scores, count))
    for share in (0.0, 0.35, 1.0):
        assert torch.equal(select_triton.top_p(weights, share, 2, 9), select.top_p(weights, share, 2, 9))
