"""Block-sparse attention in plain torch: gathers the keys of each row's tiles. Serves where no kernel of ours runs.

Shapes: B batch, L queries, T keys, H heads, D of a head.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks


def forward(
    q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, layout: BlockLayout, scale: float, k_bias: Tensor | None
) -> Partial:
    """See `dispatch.sparse_attention`. Rows of all heads of a group run together."""
    out = torch.zeros_like(q_BLHD)
    lse = q_BLHD.new_full(q_BLHD.shape[:3], -math.inf, dtype=torch.float32)
    group = layout.group.expand(q_BLHD.shape[0], -1).cpu()
    bias = None if k_bias is None else k_bias.expand(q_BLHD.shape[0], q_BLHD.shape[2], -1)
    row_ptr = layout.row_ptr.tolist()
    for g in range(layout.num_groups):
        batch, head = ((group == g).nonzero().to(layout.device)).unbind(1)
        if len(batch) == 0:
            continue
        q_tokens, k_tokens = _tokens(layout.q, g), _tokens(layout.k, g)
        for row, queries in enumerate(q_tokens):
            tiles = layout.col[row_ptr[g][row] : row_ptr[g][row + 1]].tolist()
            keys = torch.cat([k_tokens[c] for c in tiles]) if tiles else queries[:0]
            if len(queries) == 0 or len(keys) == 0:
                continue
            # Advanced indices stand first: [heads of the group, tokens, D].
            q = q_BLHD[batch[:, None], queries, head[:, None]].float()
            k, v = (x[batch[:, None], keys, head[:, None]].float() for x in (k_BTHD, v_BTHD))
            scores = q @ k.transpose(1, 2) * scale
            if bias is not None:
                scores = scores + bias[batch[:, None], head[:, None], keys][:, None]
            found = scores.logsumexp(-1)
            weights = (scores - found.masked_fill(found == -math.inf, 0.0)[..., None]).exp()
            out[batch[:, None], queries, head[:, None]] = (weights @ v).type_as(out)
            lse[batch[:, None], queries, head[:, None]] = found
    return out, lse


def _tokens(blocks: Blocks, group: int) -> list[Tensor]:
    """The tokens of every block, int64 indices."""
    offsets = blocks.offsets[min(group, len(blocks.offsets) - 1)].tolist()
    if blocks.order is None:
        order = torch.arange(offsets[-1], device=blocks.offsets.device)
    else:
        order = blocks.order[min(group, len(blocks.order) - 1)].long()
    return list(order.split([stop - start for start, stop in pairwise(offsets)]))
