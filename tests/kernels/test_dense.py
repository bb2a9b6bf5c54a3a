"""Dense attention with its LSE: library kernels against the definition."""

import math

import pytest
import torch

from longvid.kernels.dense import attend, attend_lse, attend_lse_exact


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
