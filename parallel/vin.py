"""The exchange of global tokens (VIN): what they see of each chunk's key latents, merged to what they see of all.

One cross-attention with softmax over the key latents of all chunks is exact when it is merged from parts by their LSE.
The parts are those of single chunks, merged in the order of the film on every rank: equal bits on any number of ranks.
Shapes: H heads, G tokens, d of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longvid.kernels.merge import merge_partials


def pack(out_HGd: Tensor, lse_HG: Tensor) -> Tensor:
    """A part as one tensor fp32 [H, G, d + 1], to be sent."""
    return torch.cat([out_HGd.float(), lse_HG.float()[..., None]], dim=-1)


def merge(packed: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output fp32 [H, G, d] and LSE [H, G] of all parts [H, G, d + 1], one after the other."""
    out, lse = packed[0][..., :-1], packed[0][..., -1]
    for part in packed[1:]:
        merged = merge_partials(out[:, :, None], lse[..., None], part[:, :, None, :-1], part[..., -1:])
        out, lse = merged[0][:, :, 0], merged[1][..., 0]
    return out, lse
