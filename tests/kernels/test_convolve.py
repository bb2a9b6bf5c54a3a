"""Convolutions by matrix units against torch in fp64, and bits that nothing around a pixel changes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from longvid.kernels import native
from longvid.kernels.convolve import Around, Convolution, Spread, suits

pytestmark = pytest.mark.skipif(native.isa() != "amx", reason="needs matrix units")

TAPS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)]
WIDTHS = [1, 3, 8, 16, 31, 32, 33, 48, 64, 96]


@dataclass(frozen=True)
class Case:
    """A convolution with all that it may be given."""

    frames: int
    height: int
    width: int
    channels: int
    outputs: int
    taps: tuple[int, int, int]
    has_norm: bool
    has_past: bool
    has_residual: bool
    spread: Spread
    dtype: torch.dtype
    seed: int

    def random(self, place: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + place)
        return torch.randn(shape, generator=generator).to(self.dtype)

    @property
    def depth(self) -> int:
        return self.taps[0] - 1

    @property
    def x(self) -> Tensor:
        return self.random(1, self.frames, self.height, self.width, self.channels)

    @property
    def weight(self) -> Tensor:
        count = self.channels * self.taps[0] * self.taps[1] * self.taps[2]
        return self.random(2, self.spread.value * self.outputs, self.channels, *self.taps) / count**0.5

    @property
    def bias(self) -> Tensor:
        return self.random(3, self.spread.value * self.outputs)

    @property
    def gain(self) -> Tensor | None:
        return self.random(4, self.channels) if self.has_norm else None

    @property
    def past(self) -> Tensor | None:
        return self.random(5, self.depth, *self.x.shape[1:]) if self.has_past else None

    @property
    def residual(self) -> Tensor | None:
        return self.random(6, *self.x.shape[:3], self.outputs) if self.has_residual else None

    def make(self) -> Convolution:
        return Convolution(self.weight, self.bias, self.spread, self.gain)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> Case:
    spread = draw(st.sampled_from(Spread))
    taps = {Spread.NONE: st.sampled_from(TAPS), Spread.FRAMES: st.just((3, 1, 1)), Spread.IMAGE: st.just((1, 2, 2))}
    sizes = draw(st.tuples(st.integers(1, 4), st.integers(1, 11), st.one_of(st.integers(1, 9), st.integers(30, 70))))
    channels, outputs = draw(st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)))
    flags = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return Case(*sizes, channels, outputs, draw(taps[spread]), *flags, spread, dtype, draw(st.integers(0, 2**31)))


def inputs_of(case: Case) -> Tensor:
    """What the kernel slides over: the past, then x behind its norm. In fp64."""
    x = case.x.double()
    if case.gain is not None:
        x = F.silu(F.normalize(x, dim=-1) * case.gain.double())
    past = x.new_zeros(case.depth, *x.shape[1:]) if case.past is None else case.past.double()
    return torch.cat([past, x])


def exact(case: Case) -> Tensor:
    inputs, (weight, bias) = inputs_of(case), (case.weight.double(), case.bias.double())
    padding = [0, *((size // 2) for size in case.taps[1:])]
    y = F.conv3d(inputs.permute(3, 0, 1, 2)[None], weight, bias, padding=padding)[0].permute(1, 2, 3, 0)
    groups = y.unflatten(3, (case.spread.value, -1)).unbind(3)
    if case.spread is Spread.IMAGE:  # a corner's kernel begins before the pixel, or at it
        height, width = case.height, case.width
        groups = tuple(y[:, i // 2 : i // 2 + height, i % 2 : i % 2 + width] for i, y in enumerate(groups))
    if case.residual is not None:
        groups = tuple(y + case.residual.double() for y in groups)
    if case.spread is Spread.FRAMES:
        return torch.stack(groups, dim=1).flatten(0, 1)
    if case.spread is Spread.IMAGE:
        rows = [torch.stack(groups[i : i + 2], dim=3) for i in (0, 2)]
        return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2)
    return groups[0]


def run(case: Case, convolution: Convolution) -> tuple[Tensor, Tensor]:
    """The result, and what the next call is to see as its past."""
    kept = torch.full((case.depth, *case.x.shape[1:]), torch.nan, dtype=case.dtype)
    return convolution(case.x, case.past, kept=kept, residual=case.residual), kept


@given(case=cases())
def test_as_exact_as_fp32(case: Case) -> None:
    y, kept = run(case, case.make())
    torch.testing.assert_close(y.double(), exact(case), rtol=1e-5, atol=1e-5)
    inputs = inputs_of(case)
    torch.testing.assert_close(kept.double(), inputs[len(inputs) - case.depth :], rtol=2e-6, atol=2e-6)


@given(case=cases(dtype=torch.bfloat16))
def test_bfloat16(case: Case) -> None:
    y, _ = run(case, case.make())
    torch.testing.assert_close(y.double(), exact(case), rtol=2e-2, atol=4e-2)


def test_errs_no_more_than_fp32() -> None:
    case = Case(2, 16, 16, 64, 32, (3, 3, 3), False, True, False, Spread.NONE, torch.float32, 0)
    y, _ = run(case, case.make())
    inputs = inputs_of(case).float().permute(3, 0, 1, 2)[None]
    plain = F.conv3d(inputs, case.weight, case.bias, padding=[0, 1, 1])[0].permute(1, 2, 3, 0)
    ours, fp32 = ((value.double() - exact(case)).square().mean().sqrt() for value in (y, plain))
    assert ours <= 1.2 * fp32


@given(case=cases(), data=st.data())
def test_bits_do_not_depend_on_how_many_frames_go_together(case: Case, data: st.DataObject) -> None:
    convolution = case.make()
    whole, kept = run(case, convolution)
    past, parts, start = case.past, [], 0
    while start < case.frames:
        stop = data.draw(st.integers(start + 1, case.frames))
        x, after = case.x[start:stop], torch.empty_like(kept)
        residual = None if case.residual is None else case.residual[start:stop]
        parts.append(convolution(x, past, kept=after, residual=residual))
        past, start = after, stop
    assert torch.equal(torch.cat(parts), whole)
    assert past is None or torch.equal(past, kept)


@given(case=cases(), data=st.data())
def test_bits_do_not_depend_on_the_rows_at_hand(case: Case, data: st.DataObject) -> None:
    """Neither where the rows around are elsewhere, nor where they are at hand and not wanted."""
    convolution = case.make()
    whole, _ = run(case, convolution)
    start = data.draw(st.integers(0, case.height - 1))
    stop = data.draw(st.integers(start + 1, case.height))
    scale, rows = whole.shape[1] // case.height, slice(start, stop)
    past = case.x.new_zeros(case.depth, *case.x.shape[1:]) if case.past is None else case.past
    all_inputs = torch.cat([past, case.x])
    above = all_inputs[:, start - 1] if start else None
    below = all_inputs[:, stop] if stop < case.height else None
    residual = None if case.residual is None else case.residual[:, rows]
    own = convolution(case.x[:, rows], past[:, rows], around=Around(above, below), residual=residual)
    some = convolution(case.x, past, rows=range(start, stop), residual=residual)
    assert torch.equal(own, whole[:, start * scale : stop * scale])
    assert torch.equal(some, own)


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_and_regions(taps: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The image is large enough to be cut in both directions; one row of it is not."""
    case = Case(2, 26, 150, 288, 48, taps, True, True, False, Spread.NONE, dtype, 0)
    convolution, threads = case.make(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, kept = run(case, convolution)
        torch.set_num_threads(3)
        three, kept_by_three = run(case, convolution)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three) and torch.equal(kept, kept_by_three)
    assert case.past is not None
    for row in (0, 13, 25):
        alone = convolution(case.x, case.past, rows=range(row, row + 1))
        assert torch.equal(alone, one[:, row : row + 1])
    torch.testing.assert_close(one.double(), exact(case), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=4e-2)


def test_one_frame_of_a_residual_may_be_for_several() -> None:
    case = Case(4, 3, 5, 8, 8, (1, 2, 2), False, False, False, Spread.IMAGE, torch.float32, 0)
    convolution, residual = case.make(), case.random(6, 2, 3, 5, 8)
    y = convolution(case.x, residual=residual)
    each = convolution(case.x, residual=residual.repeat_interleave(2, dim=0))
    assert torch.equal(y, each) and not torch.equal(y, convolution(case.x))


def test_is_normed_leaves_the_norm_out() -> None:
    case = Case(2, 4, 5, 32, 16, (3, 3, 3), True, True, False, Spread.NONE, torch.float32, 0)
    kept = torch.empty(2, 4, 5, 32)
    y = case.make()(case.x, case.past, kept=kept)
    assert torch.equal(case.make()(kept, case.past, is_normed=True), y)


def test_takes_what_the_matrix_units_take() -> None:
    x = torch.zeros(1, 1, 1, 1)
    assert suits(x) and suits(x.bfloat16())
    assert not suits(x.half()) and not suits(x.to("meta")) and not suits(x.requires_grad_())
