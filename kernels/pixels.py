"""What a decoder makes of images, as bytes: by the C++ of `csrc/pixels.cpp` on a CPU, else by torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longvid.kernels import native
from longvid.kernels.arguments import DTYPES

_MAX_PATCH = 8


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("columns", "patch", "dtype", "threads")),
    ]


def to_bytes(x_THWC: Tensor, patch: int = 1) -> Tensor:
    """Values in [-1, 1], beyond which they are cut off, rounded to uint8 [T, H patch, W patch, 3] on the CPU.

    The 3 patch patch values of a cell are the colours' columns' rows, as Wan has it.
    """
    num_frames, height, width, channels = x_THWC.shape
    assert channels == 3 * patch**2
    shape = num_frames, height * patch, width * patch, 3
    plain = x_THWC.device.type == "cpu" and x_THWC.dtype in DTYPES and x_THWC.is_contiguous()
    if plain and patch <= _MAX_PATCH and native.is_available():
        out = torch.empty(shape, dtype=torch.uint8)
        addresses = x_THWC.data_ptr(), out.data_ptr()
        args = _Args(*addresses, num_frames * height, width, patch, DTYPES[x_THWC.dtype], torch.get_num_threads())
        native.library().longvid_pixels(ctypes.byref(args))
        return out
    scaled = x_THWC.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu()
    cells = scaled.view(num_frames, height, width, 3, patch, patch)
    return cells.permute(0, 1, 5, 2, 4, 3).reshape(shape)
