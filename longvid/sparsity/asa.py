"""BLADE's adaptive sparse attention without its training: tiles along a curve, scored on a few of their tokens.

Shapes: B batch, L queries, T keys, H heads of this rank, D of a head, R query tiles, C key tiles, S samples of a tile,
G = B · H.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks, make_layout, own_groups
from longvid.kernels.select import top_p
from longvid.sparsity.policy import Call, is_left_dense
from longvid.sparsity.settings import Asa
from longvid.sparsity.skipped import with_skipped
from longvid.sparsity.tiles import density_of, share_of_mass, share_of_tokens, tiling
from longvid.sparsity.tokens import TokenMap

CPU_SLAB, GPU_SLAB = 1 << 21, 1 << 28
"""Scores of samples that are in memory at once."""


class AsaPolicy:
    """Every step chooses its tiles anew; nothing is remembered."""

    data_dependent = True

    def __init__(self, settings: Asa) -> None:
        self.settings = settings

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """Of each row the fewest tiles that hold `mass` by their samples, a share between `min_keep` and `max_keep`.

        Mass and shares are of the tiles that may be skipped, those of own keys: text and context come on top.
        """
        settings = self.settings
        if is_left_dense(call, settings):
            return None
        tiles = tiling(call.tokens, settings.tile, q_BLHD.device, on_curve=True)
        scores = sampled_scores(q_BLHD, k_BTHD, tiles.q, tiles.k, settings.sample)
        weights = scores.masked_fill(~tiles.optional, -math.inf).softmax(-1)
        most = max(1, round(settings.max_keep * tiles.num_optional))
        # All of the mass is all that may be kept, however small the rest: a sum would not show it.
        fewest = most if settings.mass == 1 else min(most, round(settings.min_keep * tiles.num_optional))
        chosen = top_p(weights, settings.mass, fewest, most)
        group = own_groups(q_BLHD.shape[0], q_BLHD.shape[2], q_BLHD.device)
        return make_layout(tiles.q, tiles.k, chosen | tiles.visible, group)

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """The output as it is, or with every skipped tile as one key, its mean, in the same softmax."""
        if layout is None or not self.settings.pooled:
            return partial[0]
        return with_skipped(q_BLHD, k_BTHD, v_BTHD, partial, layout)

    def head_costs(self, layer: int) -> None:
        """They differ from step to step, and K/V of neighbours stay where their heads are."""
        return

    def density(self, tokens: TokenMap) -> float:
        """Text and context whole; of own keys the share that is expected to hold `mass`, within its bounds."""
        settings = self.settings
        return density_of(tokens, max(settings.min_keep, min(share_of_mass(settings.mass), settings.max_keep)))

    def choosing(self, tokens: TokenMap) -> float:
        """The scores between samples, and their selection."""
        return 0.5 * (self.settings.sample / self.settings.tile) ** 2 + share_of_tokens(tokens, 30)


def sampled_scores(q_BLHD: Tensor, k_BTHD: Tensor, q: Blocks, k: Blocks, sample: int) -> Tensor:
    """The highest q · k / sqrt(D) between samples of each query tile and of each key tile, fp32 [G, R, C]."""
    batch, _, num_heads, head_dim = q_BLHD.shape
    groups, num_cols = batch * num_heads, k.num_blocks
    q_GSRD = _samples(q_BLHD, q, sample) / math.sqrt(head_dim)
    k_SGCD = _samples(k_BTHD, k, sample).unbind(1)
    limit = CPU_SLAB if q_BLHD.device.type == "cpu" else GPU_SLAB
    rows = max(1, limit // (groups * sample * num_cols))
    scores = []
    for q_GSrD in q_GSRD.split(rows, 2):
        some = q_GSrD.flatten(1, 2)
        # One sample of every key tile at a time: maxima of whole matrices are faster than those of few neighbours.
        highest = functools.reduce(torch.maximum, (some @ k_GCD.mT for k_GCD in k_SGCD))
        scores.append(highest.view(groups, sample, -1, num_cols).amax(1))
    return torch.cat(scores, 1).float()


def _samples(x_BTHD: Tensor, blocks: Blocks, sample: int) -> Tensor:
    """The sampled tokens of each block, [G, S, N, D]."""
    batch, _, num_heads, head_dim = x_BTHD.shape
    places = sampled_tokens(blocks, sample).view(-1, sample).T.flatten()
    return x_BTHD[:, places].transpose(1, 2).reshape(batch * num_heads, sample, -1, head_dim)


def sampled_tokens(blocks: Blocks, sample: int) -> Tensor:
    """Evenly spaced tokens of each block, int64 [N · S], some twice where it has fewer; blocks of all heads."""
    length = blocks.lengths()[0].long()[:, None]
    step = torch.arange(sample, device=length.device)
    places = (blocks.offsets[0, :-1].long()[:, None] + (2 * step + 1) * length // (2 * sample)).flatten()
    return places if blocks.order is None else blocks.order[0].long()[places]
