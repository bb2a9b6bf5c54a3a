"""Blocks pooled to one mean, one maximum, and how alike their tokens are.

Shapes: B batch, T tokens, H heads, D of a head, N blocks, G groups: 1, or one a head, b · H + h.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from longvid.kernels.layout import Blocks

Pooled = tuple[Tensor, Tensor, Tensor]


def pool(x_BTHD: Tensor, blocks: Blocks) -> Pooled:
    """Of each block: mean and maximum [B, H, N, D], and mean cosine similarity of its tokens to each other [B, H, N].

    fp32. An empty block has mean and maximum 0 and similarity 1. Blocks are the same for all heads, or each head has
    its own. Raises ValueError where they are neither.
    """
    batch, num_tokens, num_heads, _ = x_BTHD.shape
    for name, per_group in (("offsets", blocks.offsets), ("order", blocks.order)):
        if per_group is not None and per_group.shape[0] not in (1, batch * num_heads):
            raise ValueError(
                f"{name} {list(per_group.shape)} must be of one group or of one a head ({batch} × {num_heads})"
            )
    if x_BTHD.device.type == "cuda" and num_tokens and find_spec("triton") is not None:
        from longvid.kernels import pool_triton

        return pool_triton.pool(x_BTHD, blocks)
    return pool_torch(x_BTHD, blocks)


def pool_torch(x_BTHD: Tensor, blocks: Blocks) -> Pooled:
    """See `pool`. The mean of the cosines of all pairs is the square of the mean of the unit vectors."""
    batch, num_tokens, num_heads, head_dim = x_BTHD.shape
    groups, num_blocks = batch * num_heads, blocks.num_blocks
    x_GTD = x_BTHD.transpose(1, 2).reshape(groups, num_tokens, head_dim).float()
    if blocks.order is not None:
        order = blocks.order.long().expand(groups, -1)
        x_GTD = x_GTD.gather(1, order[..., None].expand_as(x_GTD))
    starts = torch.arange(groups, device=x_BTHD.device)[:, None] * num_tokens
    offsets = torch.cat([(blocks.offsets[:, :-1] + starts).flatten(), starts.new_full((1,), groups * num_tokens)])
    x = x_GTD.flatten(0, 1)
    unit = torch.nn.functional.normalize(x, dim=-1)
    length = blocks.lengths().expand(groups, -1).reshape(-1, 1)
    mean, unit_mean = (_reduce(values, "sum", offsets) / length.clamp(min=1) for values in (x, unit))
    largest = _reduce(x, "max", offsets).masked_fill(length == 0, 0.0)
    similarity = unit_mean.square().sum(-1).masked_fill(length[:, 0] == 0, 1.0)
    shape = (batch, num_heads, num_blocks)
    return mean.view(*shape, head_dim), largest.view(*shape, head_dim), similarity.view(shape)


def _reduce(x: Tensor, how: str, offsets: Tensor) -> Tensor:
    return torch.segment_reduce(x, how, offsets=offsets, axis=0, unsafe=True)
