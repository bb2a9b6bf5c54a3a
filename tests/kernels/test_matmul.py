"""Linear layers by matrix units, against torch in fp64; bits that depend on nothing but a row and the weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.kernels import matmul

needs_units = pytest.mark.skipif(not matmul.has_matrix_units(), reason="this processor has no matrix units (AMX)")

sizes = st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 800, 1537]))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw(seed: int, rows: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias."""
    return (
        random(seed, rows, depth, dtype=dtype),
        random(seed + 1, columns, depth, dtype=dtype),
        random(seed + 2, columns, dtype=dtype),
    )


def errors(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """Of each number, in parts of what its row and column could sum up to."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = F.linear(*wide)
    if gelu:
        exact = F.gelu(exact, approximate="tanh")
    whole = x.double().norm(dim=-1)[..., None] * weight.double().norm(dim=-1) + (0 if bias is None else bias.abs())
    return (found.double() - exact).abs() / whole


@needs_units
@settings(max_examples=60)
@given(
    rows=st.integers(1, 100),
    columns=sizes,
    depth=sizes,
    dtype=dtypes,
    seed=seeds,
    has_bias=st.booleans(),
    gelu=st.booleans(),
)
def test_products_of_any_shape(
    rows: int, columns: int, depth: int, dtype: torch.dtype, seed: int, has_bias: bool, gelu: bool
) -> None:
    x, weight, bias = draw(seed, rows, columns, depth, dtype)
    given_bias = bias if has_bias else None
    found = matmul.linear(x, weight, given_bias, gelu=gelu)
    assert found.dtype == dtype and found.shape == (rows, columns)
    worst = errors(found, x, weight, given_bias, gelu=gelu).max()
    assert worst <= TOLERANCE[dtype]
    packed = matmul.pack(weight)
    assert torch.equal(matmul.linear(x, weight, given_bias, packed, gelu=gelu), found)
    row = rows // 2
    assert torch.equal(matmul.linear(x[row : row + 1], weight, given_bias, packed, gelu=gelu), found[row : row + 1])
    wide = x.repeat(1, 2)[:, depth:]
    assert torch.equal(matmul.linear(wide[None], weight.repeat(1, 2)[:, :depth], given_bias, gelu=gelu)[0], found)


@needs_units
@pytest.mark.parametrize("depth", [64, 1024, 5120])
def test_fp32_is_as_exact_as_torchs(depth: int) -> None:
    x, weight, bias = draw(depth, 48, 96, depth, torch.float32)
    ours = errors(matmul.linear(x, weight, bias), x, weight, bias)
    theirs = errors(F.linear(x, weight, bias), x, weight, bias)
    assert ours.square().mean() <= 1.5 * theirs.square().mean()


@needs_units
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_all_sizes(dtype: torch.dtype) -> None:
    """Exponents from one end to the other, as long as no sum leaves them."""
    powers = torch.arange(-60, 61, 6).double().exp2()
    x, weight = powers[:, None] * random(1, len(powers), 64).double(), random(2, 40, 64) * 2.0**20
    x = x.to(dtype)
    assert errors(matmul.linear(x, weight.to(dtype)), x, weight.to(dtype), None).max() <= (
        1e-6 if dtype == torch.float32 else 2**-8
    )


@needs_units
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given_packed", [False, True])
def test_bits_do_not_depend_on_rows_or_threads(dtype: torch.dtype, given_packed: bool) -> None:
    """Enough work for all threads, by rows and by columns; groups of panels, and depth in several parts."""
    x, weight, bias = draw(5, 700, 1100, 1700, dtype)
    packed = matmul.pack(weight) if given_packed else None
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(matmul.linear(x, weight, bias, packed))
            few = [matmul.linear(part, weight, bias, packed) for part in (x[300:301], x[301:400])]
            assert torch.equal(torch.cat(few), found[-1][300:400])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert errors(found[0], x, weight, bias).max() <= TOLERANCE[dtype]


@needs_units
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(dtype: torch.dtype, bad: float) -> None:
    x, weight, _ = draw(3, 40, 50, 70, dtype)
    clean = matmul.linear(x, weight)
    x[17, 69] = bad
    found = matmul.linear(x, weight)
    assert not found[17].isfinite().any()
    others = torch.arange(40) != 17
    assert torch.equal(found[others], clean[others])
    weight[49, 3] = bad
    assert not matmul.linear(x, weight)[:, 49].isfinite().any()


def test_torch_computes_what_matrix_units_do_not_take() -> None:
    x, weight, bias = draw(8, 4, 6, 10, torch.float64)
    assert torch.equal(matmul.linear(x, weight, bias), F.linear(x, weight, bias))
    learned = nn.Parameter(weight.float())
    out = matmul.linear(x.float(), learned, bias.float())
    out.sum().backward()
    assert learned.grad is not None
    assert matmul.linear(x.float()[:0], learned, None).shape == (0, 6)
    close = matmul.linear(x.float(), learned.detach(), bias.float(), gelu=True)
    torch.testing.assert_close(close, F.gelu(out, approximate="tanh").detach())
