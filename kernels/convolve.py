"""Convolutions over frames, rows and columns by the matrix units of x86, as exact as fp32: `csrc/conv_amx.cpp`.

A float is split into three bf16, and six of the nine products of two floats' parts are taken. Norm and SiLU before a
convolution, bias and residual behind it are in the same pass, so nothing is padded, joined or written twice. A pixel's
bits depend on the values around it alone: not on the size of the image, nor on how many frames, rows or threads there
are.

Shapes: T frames, H height, W width, C channels, O outputs, t h w the kernel's; images are contiguous [T, H, W, C]. All
strides are one, and a kernel is 1, 2 or 3 wide.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.kernels import native
from longvid.kernels.arguments import DTYPES

_OUTPUTS, _DEPTH = 16, 32
"""A right-hand tile's outputs and channels."""
_MAX_GROUPS = 4


class Spread(Enum):
    """Where the groups of outputs that a convolution has stand in its result."""

    NONE = 1
    """One group."""
    FRAMES = 2
    """Two, which become two frames."""
    IMAGE = 4
    """Four, which become the corners of twice the height and width. Their 2x2 kernels see the pixel and those before
    it, or behind it."""


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "past", "above", "below", "kept", "gain", "weight", "bias")),
        *((name, ctypes.c_void_p) for name in ("residual", "out")),
        *((name, ctypes.c_int64) for name in ("out_frame", "out_row", "out_pixel")),
        ("out_group", ctypes.c_int64 * _MAX_GROUPS),
        *((name, ctypes.c_int32 * _MAX_GROUPS) for name in ("first_row", "first_column")),
        ("taps", ctypes.c_int32 * 3),
        *((name, ctypes.c_int32) for name in ("frames", "rows", "columns", "channels", "groups", "outputs", "top")),
        *((name, ctypes.c_int32) for name in ("source_rows", "residual_times", "dtype", "threads")),
    ]


@dataclass(frozen=True)
class Around:
    """The rows above and below those at hand [depth + T, W, C], each None where zeros are."""

    above: Tensor | None
    below: Tensor | None


NOTHING = Around(None, None)


def suits(x: Tensor) -> bool:
    """Whether the matrix units of this processor can work on a tensor."""
    known = x.device.type == "cpu" and x.dtype in DTYPES and type(x) in (Tensor, nn.Parameter)
    return known and native.isa() == "amx" and not (x.requires_grad and torch.is_grad_enabled())


class Convolution:
    """A convolution's weights [groups · O, C, t, h, w] and bias [groups · O], as many groups as ``spread`` says.

    They are packed at the first call, which takes 1.5 times the memory of fp32 weights, or as much as bf16 ones.
    ``gain`` [C] is that of a norm, x / max(|x|, 1e-12) · gain over the channels, through which x goes before, and then
    through SiLU.
    """

    def __init__(self, weight: Tensor, bias: Tensor, spread: Spread = Spread.NONE, gain: Tensor | None = None) -> None:
        outputs, self.channels, *taps = weight.shape
        assert max(taps) <= 3 and bias.shape == (outputs,) and bias.dtype == weight.dtype
        self.outputs, self.depth, self.spread = outputs // spread.value, taps[0] - 1, spread
        """`depth`: frames of the past that it sees."""
        self._weight, self._bias, self._gain = weight, bias, gain

    @cached_property
    def _packed(self) -> tuple[_Args, list[Tensor]]:
        """What all calls have in common, and the tensors that it points at."""
        groups, taps = self.spread.value, self._weight.shape[2:]
        held = [_pack(self._weight.unflatten(0, (groups, -1))), _pad(self._bias.float().view(groups, -1), _OUTPUTS)]
        args = _Args(weight=held[0].data_ptr(), bias=held[1].data_ptr(), groups=groups)
        args.channels, args.outputs, args.taps = self.channels, self.outputs, tuple(taps)
        args.dtype = DTYPES[self._weight.dtype]
        if self._gain is not None:
            held.append(_pad(self._gain.float()[None], _DEPTH))
            args.gain = held[2].data_ptr()
        for group in range(groups):
            row, column = divmod(group, 2) if self.spread is Spread.IMAGE else (0, 0)
            args.first_row[group], args.first_column[group] = row - taps[1] // 2, column - taps[2] // 2
        return args, held

    def __call__(
        self,
        x: Tensor,
        past: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        around: Around = NOTHING,
        rows: range | None = None,
        residual: Tensor | None = None,
        is_normed: bool = False,
    ) -> Tensor:
        """Convolve x [T, H, W, C], zeros around it; [T, H, W, O], or what ``spread`` makes of it.

        ``past`` [depth, H, W, C] are the inputs before, None: zeros; they had their norm. ``kept`` of the same shape
        gets the last inputs, so that they are the next call's past. ``around`` has rows of the image that are
        elsewhere, x behind the frames of the past. Of x, ``rows`` are wanted alone. ``residual``
        [T or a part of it, H, W, O] is added to each of the groups, a frame of it to T / its frames. ``is_normed``: x
        had its norm, too.
        """
        frames, height, width, channels = x.shape
        rows = range(height) if rows is None else rows
        assert x.dtype == self._weight.dtype and channels == self.channels
        out = x.new_empty(self._shape(frames, len(rows), width))
        if not out.numel():
            return out
        args = _Args.from_buffer_copy(self._packed[0])
        if is_normed:
            args.gain = None
        inputs = {"x": x, "past": past, "above": around.above, "below": around.below, "residual": residual}
        held = {name: value.contiguous() for name, value in inputs.items() if value is not None}
        for name, value in held.items():
            assert value.dtype == x.dtype
            setattr(args, name, value.data_ptr())
        if kept is not None:
            assert kept.is_contiguous() and kept.shape == (self.depth, len(rows), width, channels)
            args.kept = kept.data_ptr()
        if residual is not None:
            assert residual.shape[1:] == (len(rows), width, self.outputs) and frames % len(residual) == 0
            args.residual_times = frames // len(residual)
        args.out, args.frames, args.rows, args.columns = out.data_ptr(), frames, len(rows), width
        args.source_rows, args.top, args.threads = height, rows.start, torch.get_num_threads()
        self._place(args)
        status = native.library().longvid_convolve(ctypes.byref(args))
        assert status == 0, "the tensors suit the matrix units"
        return out

    def _shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        times, scale = 1 + (self.spread is Spread.FRAMES), 1 + (self.spread is Spread.IMAGE)
        return frames * times, height * scale, width * scale, self.outputs

    def _place(self, args: _Args) -> None:
        """Say where the values of the result lie: strides, and each group's first one."""
        pixel, line = self.outputs, args.columns * self.outputs
        frame = args.rows * line
        if self.spread is Spread.NONE:
            args.out_frame, args.out_row, args.out_pixel = frame, line, pixel
        elif self.spread is Spread.FRAMES:
            args.out_frame, args.out_row, args.out_pixel = 2 * frame, line, pixel
            args.out_group[1] = frame
        else:
            args.out_frame, args.out_row, args.out_pixel = 4 * frame, 4 * line, 2 * pixel
            args.out_group = (0, pixel, 2 * line, 2 * line + pixel)


def _pad(values: Tensor, multiple: int) -> Tensor:
    """[K, n] with zeros behind up to a multiple."""
    return F.pad(values, (0, -values.shape[1] % multiple)).contiguous()


def _pack(weight_GOCthw: Tensor) -> Tensor:
    """Right-hand tiles [G, sixteens of outputs, t, h, chunks of 32 channels, w, parts, 16 pairs of channels, 16, 2]."""
    channels, outputs = weight_GOCthw.shape[2], weight_GOCthw.shape[1]
    pad = *(0, 0) * 3, 0, -channels % _DEPTH, 0, -outputs % _OUTPUTS
    tiles = F.pad(weight_GOCthw, pad).unflatten(2, (-1, _DEPTH // 2, 2)).unflatten(1, (-1, _OUTPUTS))
    return torch.stack(_split(tiles.permute(0, 1, 6, 7, 3, 8, 4, 2, 5)), dim=6).contiguous()


def _split(x: Tensor) -> list[Tensor]:
    """Parts in bf16 whose sum it is."""
    if x.dtype == torch.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts
