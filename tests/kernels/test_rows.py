"""What layers do to single tokens, by the C++ of every instruction set, against torch in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from longvid.kernels import native, rows

ISAS = [isa for isa in native.ISAS if native.is_available() and native.ISAS.index(isa) <= native.isa_index(None)]

shapes = st.tuples(st.integers(0, 5), st.integers(1, 67))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == exact.shape
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_every_instruction_set_of_this_processor_was_built() -> None:
    assert ISAS, "longvid was installed without a compiler"


@pytest.mark.parametrize("isa", ISAS)
@given(shape=shapes, dtype=dtypes, seed=seeds, num_kinds=st.integers(0, 3))
def test_norms(isa: native.Isa, shape: tuple[int, int], dtype: torch.dtype, seed: int, num_kinds: int) -> None:
    x = random(seed, *shape, dtype=dtype)
    gain, shift = (random(seed + i, max(1, num_kinds), shape[1]) for i in (1, 2))
    kinds = torch.arange(shape[0], dtype=torch.int32) % num_kinds if num_kinds else None
    each = (lambda table: table.double()[kinds]) if num_kinds else (lambda table: table.double())
    wide = x.double()
    normed = F.layer_norm(wide, wide.shape[-1:], eps=1e-3)
    close(rows.layer_norm(x, gain, shift, kinds, 1e-3, isa), normed * each(gain) + each(shift), dtype)
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    close(rows.rms_norm(x, gain[0], 1e-6, isa), normed * gain[0].double(), dtype)
    for silu in (False, True):
        out = torch.empty_like(x)
        rows.unit_norm(x, gain[0], out, silu=silu, isa=isa)
        exact = F.normalize(wide, dim=-1) * gain[0].double()
        close(out, F.silu(exact) if silu else exact, dtype)
    close(rows.add_gated(x, x.flip(0), gain, kinds, isa), wide + wide.flip(0) * each(gain), dtype)


@pytest.mark.parametrize("isa", ISAS)
@given(count=st.integers(0, 70), dtype=dtypes, seed=seeds, size=st.sampled_from([1.0, 100.0]))
def test_gelu(isa: native.Isa, count: int, dtype: torch.dtype, seed: int, size: float) -> None:
    x = random(seed, count, dtype=dtype) * size
    close(rows.gelu(x, isa), F.gelu(x.double(), approximate="tanh"), dtype)


@pytest.mark.parametrize("isa", ISAS)
@given(sizes=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 20)), dtype=dtypes, seed=seeds)
def test_rotary_embedding(isa: native.Isa, sizes: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
    tokens, heads, pairs = sizes
    x = random(seed, 1, tokens, heads, 2 * pairs, dtype=dtype)
    angles = random(seed, 1, tokens, 1, pairs).repeat_interleave(2, dim=-1)
    wide = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = wide * torch.polar(torch.ones(()).double(), angles[..., ::2].double())
    exact = torch.view_as_real(turned).flatten(-2)
    close(rows.rotate(x, angles.cos(), angles.sin(), isa=isa), exact, dtype)
    room = torch.full((1, tokens + 2, heads, 2 * pairs), 7.0, dtype=dtype)
    strided = x.repeat(1, 1, 2, 1)[:, :, heads:]
    rows.rotate(strided, angles.cos(), angles.sin(), room[:, 1:-1], isa)
    close(room[:, 1:-1], exact, dtype)
    assert (room[:, [0, -1]] == 7).all()


def test_infinities_and_nan_come_through() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [float("inf"), 0.0, 1.0, 2.0]])
    ones = torch.ones(1, 4)
    assert rows.layer_norm(x, ones, ones, None, 1e-6).isnan()[0].all()
    assert rows.rms_norm(x, ones[0], 1e-6)[0].isnan().all()
    assert rows.gelu(x).isnan().equal(x.isnan()) and rows.gelu(x)[1, 0] == float("inf")
    assert rows.add_gated(x, x, ones, None).isnan().equal(x.isnan())


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: rows.layer_norm(x, torch.ones(1, 8), torch.zeros(1, 8), None, 1e-6),
    "rms norm": lambda x: rows.rms_norm(x, torch.ones(8), 1e-6),
    "gated sum": lambda x: rows.add_gated(x, x, torch.ones(1, 8), None),
    "gelu": rows.gelu,
    "rotary": lambda x: rows.rotate(x.view(1, -1, 1, 8), *torch.ones(2, 1, len(x), 1, 8)).view_as(x),
}


@pytest.mark.parametrize("name", CALLS)
def test_other_tensors_and_gradients_go_by_torch(name: str) -> None:
    x = random(3, 6, 8)
    plain = CALLS[name](x)
    for other in (x.double(), x.t().contiguous().t(), x.clone().requires_grad_()):
        found = CALLS[name](other)
        torch.testing.assert_close(found.float(), plain, rtol=1e-5, atol=1e-5)
        assert found.dtype == other.dtype and found.requires_grad == other.requires_grad
    threads = torch.get_num_threads()
    large = random(4, 9000, 64)
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(rows.gelu(large))
    finally:
        torch.set_num_threads(threads)
    assert results[0].equal(results[1])
