"""Dense attention with its LSE: library kernels against the definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longvid.kernels import cpu, native
from longvid.kernels.dense import MIN_KEYS, attend, attend_lse, attend_lse_exact, suits_matrix_units

has_amx = pytest.mark.skipif(native.isa() != "amx", reason="this processor has no matrix units for bf16")


def qkv(queries, keys, dtype=torch.float32, heads=2, width=16):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    return [torch.randn(1, n, heads, width, generator=generator).to(dtype) for n in (queries, keys, keys)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 40), (130, 65)])
def test_output_and_lse_are_those_of_exact_attention(dtype, tolerance, queries, keys):
    q, k, v = qkv(queries, keys, dtype)
    out, lse = attend_lse(q, k, v)
    expected_out, expected_lse = attend_lse_exact(*(x.double() for x in (q, k, v)))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == q.shape and lse.shape == q.shape[:3]
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=tolerance)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4 if dtype == torch.bfloat16 else 1e-5)


def test_exact_attention_is_that_of_torch():
    q, k, v = qkv(9, 33, torch.float64)
    torch.testing.assert_close(attend_lse_exact(q, k, v)[0], attend(q, k, v), rtol=0, atol=1e-12)


def test_the_lse_is_natural_and_of_scaled_scores():
    q, k, v = qkv(1, 1)
    score = (q * k).sum(-1) / math.sqrt(q.shape[-1])
    torch.testing.assert_close(attend_lse(q, k, v)[1], score)


def test_without_keys_the_output_is_zero_and_the_lse_minus_infinity():
    out, lse = attend_lse(*qkv(5, 0))
    assert out.shape == (1, 5, 2, 16) and not out.any()
    assert lse.shape == (1, 5, 2) and (lse == -math.inf).all()


def test_without_queries_there_is_nothing():
    out, lse = attend_lse(*qkv(0, 5))
    assert out.shape == (1, 0, 2, 16)
    assert lse.shape == (1, 0, 2)


def test_strided_heads_are_read_in_place():
    q, k, v = (x[:, :, 1:3] for x in qkv(6, 12, heads=4))
    expected = attend_lse_exact(q, k, v)
    for one, other in zip(attend_lse(q, k, v), expected, strict=True):
        torch.testing.assert_close(one, other)


def to_double(x):
    return x.double().transpose(1, 2)


@has_amx
@settings(max_examples=40)
@given(
    queries=st.integers(1, 300),
    keys=st.integers(1, 1100),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 16, 40, 64, 128, 250]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    has_bias=st.booleans(),
)
def test_matrix_units_compute_dense_attention(queries, keys, heads, width, dtype, has_bias):
    q, k, v = qkv(queries, keys, dtype, heads, width)
    bias = torch.randn(1, heads, keys, generator=torch.Generator().manual_seed(keys)) if has_bias else None
    if has_bias and keys > 1:
        bias[..., keys // 2] = -math.inf
    out, lse = cpu.dense(q, k, v, bias)
    mask = None if bias is None else bias[:, :, None].double()
    expected = F.scaled_dot_product_attention(*(to_double(x) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    scores = torch.einsum("blhd,bthd->bhlt", q.double(), k.double()) / math.sqrt(width)
    expected_lse = (scores if mask is None else scores + mask).logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@has_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_bits_depend_on_its_query_and_the_keys_alone(dtype):
    q, k, v = qkv(200, 700, dtype, width=40)
    whole, threads = cpu.dense(q, k, v), torch.get_num_threads()
    try:
        for count, rows in ((1, slice(0, 200)), (3, slice(0, 1)), (2, slice(31, 190)), (1, slice(150, 199))):
            torch.set_num_threads(count)
            part = cpu.dense(q[:, rows], k, v)
            assert all(torch.equal(a, b[:, rows]) for a, b in zip(part, whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@has_amx
def test_what_the_models_call_takes_matrix_units_where_they_serve():
    keys = MIN_KEYS[torch.float32] + 20
    q, k, v = qkv(3, keys)
    bias = torch.zeros(1, 1, 1, keys).index_fill(-1, torch.arange(5), -math.inf)
    assert torch.equal(attend(q, k, v, bias), cpu.dense(q, k, v, bias[:, :, 0])[0])
    assert all(torch.equal(a, b) for a, b in zip(attend_lse(q, k, v), cpu.dense(q, k, v), strict=True))
    of_each_query = bias.expand(-1, -1, 3, -1).clone()
    torch.testing.assert_close(attend(q, k, v, of_each_query), attend(q, k, v, bias), rtol=1e-5, atol=1e-6)
    assert not suits_matrix_units(q, k[:, 21:], v[:, 21:])
    assert not suits_matrix_units(*(x.double() for x in (q, k, v)))
    wanted = q.clone().requires_grad_()
    attend(wanted, k, v).sum().backward()
    assert wanted.grad is not None
    with torch.no_grad():
        assert suits_matrix_units(wanted, k, v)
