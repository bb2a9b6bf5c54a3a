"""Block-sparse attention is the oracle's, whoever computes it."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.kernels import cpu, gather, native, reference
from longvid.kernels.dispatch import backend_for, check, sparse_attention
from longvid.kernels.layout import Blocks, even_blocks, make_layout, one_group
from longvid.kernels.merge import merge_partials

ISAS = native.ISAS[: native.ISAS.index(native.isa()) + 1] if native.is_available() else ()
FORWARDS = {"gather": gather.forward, **{name: functools.partial(cpu.forward, isa=name) for name in ISAS}}
forwards = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
isas = pytest.mark.parametrize("isa", ISAS)


def random(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def scale_of(q):
    return 1 / math.sqrt(q.shape[-1])


def assert_close(found, expected, dtype=torch.float32, q_scale=1.0):
    """fp32 within 1e-5 for unit normal inputs; a score's rounding error grows with it. Halves as they round."""
    out, lse = found
    expected_out, expected_lse = expected
    tolerance = {torch.float32: 1e-5 * max(1.0, q_scale), torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5 * max(1.0, q_scale))


def dense_layout(num_queries, num_keys, num_heads, tile=16):
    q, k = even_blocks(num_queries, tile), even_blocks(num_keys, tile)
    return make_layout(q, k, torch.ones(1, q.num_blocks, k.num_blocks, dtype=torch.bool), one_group(num_heads))


@forwards
@settings(max_examples=150)
@given(data=st.data())
def test_it_is_the_oracle_on_any_layout(forward, layouts, data):
    batch, num_heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    num_queries, num_keys = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 90))
    dim = data.draw(st.sampled_from([1, 3, 8, 16, 20, 33, 64, 100, 128, 256]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    seed = data.draw(st.integers(0, 1000))
    q_scale = data.draw(st.sampled_from([0.1, 1.0, 6.0]))
    q = random(seed, batch, num_queries, num_heads, dim, scale=q_scale).to(dtype)
    k, v = (random(seed + i, batch, num_keys, num_heads, dim).to(dtype) for i in (1, 2))
    bias = None
    if data.draw(st.booleans()):
        bias = random(
            seed + 3, data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, num_heads])), num_keys
        )
        hidden = random(seed + 4, num_keys) < data.draw(st.sampled_from([-9.0, 0.0, 9.0]))
        bias = bias.masked_fill(hidden, -math.inf)
    layout = data.draw(layouts(num_queries, num_keys, batch, num_heads))
    expected = reference.sparse_attention(q, k, v, layout, k_bias=bias)
    assert_close(forward(q, k, v, layout, scale_of(q), bias), expected, dtype, q_scale)


@forwards
@pytest.mark.parametrize("dim", [24, 64, 128])
def test_it_is_the_oracle_on_more_tokens_than_a_work_item(forward, dim):
    q, k, v = random(1, 1, 300, 2, dim), random(2, 1, 700, 2, dim), random(3, 1, 700, 2, dim)
    blocks = Blocks(torch.tensor([[0, 290, 300]], dtype=torch.int32))
    mask = torch.rand(1, 2, 11, generator=torch.Generator().manual_seed(4)) < 0.6
    layout = make_layout(blocks, even_blocks(700, 64), mask, one_group(2))
    assert_close(forward(q, k, v, layout, scale_of(q), None), reference.sparse_attention(q, k, v, layout))


@forwards
@pytest.mark.parametrize("tokens", [(1, 1), (1, 40), (40, 1)])
def test_single_tokens(forward, tokens):
    q, k, v = random(1, 1, tokens[0], 1, 16), random(2, 1, tokens[1], 1, 16), random(3, 1, tokens[1], 1, 16)
    layout = dense_layout(*tokens, 1)
    assert_close(forward(q, k, v, layout, 0.3, None), reference.sparse_attention(q, k, v, layout, scale=0.3))


@forwards
def test_rows_without_keys_are_zero_and_minus_infinity(forward):
    q, k, v = random(1, 2, 32, 3, 8), random(2, 2, 48, 3, 8), random(3, 2, 48, 3, 8)
    mask = torch.tensor([[[False, False, False], [True, False, True]]])
    layout = make_layout(even_blocks(32, 16), even_blocks(48, 16), mask, torch.tensor([[0, -1, 0]]))
    out, lse = forward(q, k, v, layout, scale_of(q), None)
    assert not out[:, :16].any() and not out[:, :, 1].any() and out[:, 16:, ::2].all()
    assert (lse[:, :16] == -math.inf).all() and (lse[:, :, 1] == -math.inf).all() and lse[:, 16:, ::2].isfinite().all()
    hidden = torch.full((1, 1, 48), -math.inf)
    out, lse = forward(q, k, v, layout, scale_of(q), hidden)
    assert not out.any() and (lse == -math.inf).all()


@forwards
def test_scores_of_any_size_neither_overflow_nor_vanish(forward):
    q, k, v = random(1, 1, 20, 1, 16, scale=40), random(2, 1, 200, 1, 16, scale=40), random(3, 1, 200, 1, 16)
    layout = dense_layout(20, 200, 1)
    out, lse = forward(q, k, v, layout, 1.0, None)
    expected_out, expected_lse = reference.sparse_attention(q, k, v, layout, scale=1.0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-2, atol=1e-2)


@forwards
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_shows_in_the_rows_that_read_it_and_nowhere_else(forward, which):
    x = {"q": random(1, 1, 40, 2, 24), "k": random(2, 1, 70, 2, 24), "v": random(3, 1, 70, 2, 24)}
    mask = torch.tensor([[[True, False, True, True, False], [False, True, False, True, True], [True] * 5]])
    layout = make_layout(even_blocks(40, 16), even_blocks(70, 16), mask, one_group(2))
    clean = forward(*x.values(), layout, scale_of(x["q"]), None)
    x[which][0, 19, 1, 5] = math.nan
    reads = torch.zeros(40, 2, dtype=torch.bool)
    reads[19 if which == "q" else slice(16, 40), 1] = True
    out, lse = forward(*x.values(), layout, scale_of(x["q"]), None)
    affected = out[0, :, :, 5].isnan()
    assert torch.equal(affected, reads)
    if which != "v":
        assert torch.equal(out[0].isnan().all(-1), reads) and torch.equal(lse[0].isnan(), reads)
    assert torch.equal(out[0, ~reads], clean[0][0, ~reads])


@forwards
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_give_no_finite_wrong_number(forward, which, value):
    x = [random(i, 1, 40, 1, 16) for i in range(3)]
    x[which][0, 7, 0, 3] = value
    layout = dense_layout(40, 40, 1)
    out, _ = forward(*x, layout, 0.25, None)
    expected, _ = reference.sparse_attention(*x, layout, scale=0.25)
    finite = out.isfinite()
    torch.testing.assert_close(out[finite].double(), expected[finite], rtol=1e-5, atol=1e-5)


@forwards
def test_strides_do_not_matter(forward):
    q, k, v = (random(i, 2, 3, 40, 16) for i in range(3))
    layout = dense_layout(40, 40, 3)
    views = [x.transpose(1, 2) for x in (q, k)] + [v.transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2)]
    found = forward(*views, layout, 0.25, None)
    expected = forward(*(x.contiguous() for x in views), layout, 0.25, None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@forwards
@settings(max_examples=15)
@given(data=st.data())
def test_parts_of_the_keys_merge_to_the_whole(forward, layouts, data):
    q, k, v = random(1, 1, 50, 2, 16), random(2, 1, 60, 2, 16), random(3, 1, 60, 2, 16)
    layout = data.draw(layouts(50, 60, 1, 2))
    cut = data.draw(st.integers(0, 60))
    tokens = torch.randperm(60, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    partials = [
        forward(q, k[:, part], v[:, part], layout.keep(None, part), 0.25, None)
        for part in (tokens[:cut], tokens[cut:])
        if len(part)
    ]
    merged = partials[0] if len(partials) == 1 else merge_partials(*partials[0], *partials[1])
    assert_close(merged, reference.sparse_attention(q, k, v, layout, scale=0.25))


@pytest.mark.skipif("amx" not in ISAS, reason="this processor has no matrix units for bf16")
@pytest.mark.parametrize("dim", [64, 128])
def test_three_bf16_are_as_exact_as_a_float(dim):
    q, k, v = random(1, 1, 100, 2, dim), random(2, 1, 500, 2, dim), random(3, 1, 500, 2, dim)
    blocks = Blocks(torch.tensor([[0, 30, 47, 128, 137, 300, 500]], dtype=torch.int32))
    layout = make_layout(even_blocks(100, 64), blocks, torch.ones(1, 2, 6, dtype=torch.bool), one_group(2))
    expected = reference.sparse_attention(q, k, v, layout)

    def errors(isa):
        found = cpu.forward(q, k, v, layout, scale_of(q), None, isa=isa)
        return [float((x - y).square().mean().sqrt()) for x, y in zip(found, expected, strict=True)]

    for matrix_units, floats in zip(errors("amx"), errors("avx512"), strict=True):
        assert matrix_units < 1.5 * floats < 1e-6


@isas
def test_threads_do_not_change_a_bit(isa):
    q, k, v = (random(i, 1, 500, 3, 40) for i in range(3))
    cuts = torch.tensor([[0, 7, 180, 181, 181, 333, 500]], dtype=torch.int32)
    mask = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(5)) < 0.7
    layout = make_layout(Blocks(cuts), Blocks(cuts), mask, one_group(3))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(cpu.forward(q, k, v, layout, 0.2, None, isa=isa))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@isas
@pytest.mark.parametrize("field", ["col", "group", "order", "offsets"])
def test_indices_that_point_outside_are_refused(isa, field):
    q, k, v = (random(i, 1, 32, 2, 8) for i in range(3))
    layout = dense_layout(32, 32, 2)
    if field == "order":
        layout = dataclasses.replace(layout, k=Blocks(layout.k.offsets, torch.full((1, 32), 32, dtype=torch.int32)))
    elif field == "offsets":
        layout = dataclasses.replace(layout, q=Blocks(torch.tensor([[0, 40, 32]], dtype=torch.int32)))
    else:
        layout = dataclasses.replace(layout, **{field: getattr(layout, field) + 7})
    with pytest.raises(ValueError, match="point outside"):
        cpu.forward(q, k, v, layout, 0.3, None, isa=isa)


@pytest.mark.parametrize("backend", ["gather", *(["cpu"] if ISAS else [])])
def test_the_dispatcher_scales_rows_and_takes_no_tokens(backend):
    q, k, v = (random(i, 1, 32, 2, 8) for i in range(3))
    layout = dense_layout(32, 32, 2)
    share = torch.rand(1, 32, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    found = sparse_attention(q, k, v, layout, row_scale=share, backend=backend)
    assert_close(found, reference.sparse_attention(q, k, v, layout, row_scale=share))
    out, lse = sparse_attention(q, k[:, :0], v[:, :0], dense_layout(32, 0, 2), backend=backend)
    assert not out.any() and (lse == -math.inf).all()


def test_the_cpu_has_the_cpp_where_it_was_built():
    assert backend_for(torch.device("cpu")) == ("cpu" if native.is_available() else "gather")


WRONG = {
    "four dims": {"q": torch.zeros(32, 2, 8)},
    "k and v": {"v": torch.zeros(1, 31, 2, 8)},
    "heads": {"q": torch.zeros(1, 32, 3, 8)},
    "head dim": {x: torch.zeros(1, 32, 2, 257) for x in "qkv"},
    "dtype": {"k": torch.zeros(1, 32, 2, 8, dtype=torch.bfloat16)},
    "double": {x: torch.zeros(1, 32, 2, 8, dtype=torch.float64) for x in "qkv"},
    "device": {"q": torch.zeros(1, 32, 2, 8, device="meta")},
    "queries": {"q": torch.zeros(1, 33, 2, 8)},
    "bias": {"k_bias": torch.zeros(1, 3, 32)},
    "group": {"layout": dense_layout(32, 32, 3)},
    "row_ptr": {"layout": dataclasses.replace(dense_layout(32, 32, 2), q=even_blocks(32, 8))},
    "order": {
        "layout": dataclasses.replace(
            dense_layout(32, 32, 2), k=Blocks(even_blocks(32, 16).offsets, torch.zeros(1, 31, dtype=torch.int32))
        )
    },
    "offsets": {"layout": dataclasses.replace(dense_layout(32, 32, 2), k=Blocks(torch.zeros(3, 3, dtype=torch.int32)))},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_refused(wrong):
    right = {x: torch.zeros(1, 32, 2, 8) for x in "qkv"} | {"layout": dense_layout(32, 32, 2), "k_bias": None}
    check(**right)
    with pytest.raises(ValueError, match=r"must|supported|on|end at"):
        check(**(right | wrong))
