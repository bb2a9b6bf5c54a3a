"""A film's tokens cut into cuboids of (latents, rows, columns): the blocks that static layouts are made of.

Cuboids are aligned to true positions, so those of queries and keys lie over each other whatever range each begins at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longvid.kernels.layout import Blocks
from longvid.sparsity.tokens import TokenMap

Extent = tuple[int, int, int]
"""Latents, rows and columns of a cuboid; those at the borders are smaller."""


@dataclass(frozen=True)
class Cuboids:
    """Blocks in the order of their first tokens, and the place of each: its index along t, h and w, int64 [N].

    `is_global` bool [N] marks blocks without a place (-1): text, and of keys also the context outside `own`. All
    queries see global keys; global queries, which are text, see all keys.
    """

    blocks: Blocks
    t: Tensor
    h: Tensor
    w: Tensor
    is_global: Tensor


@dataclass(frozen=True)
class Cut:
    """Queries and keys in cuboids of one extent."""

    queries: Cuboids
    keys: Cuboids
    extent: Extent


def cut_cuboids(tokens: TokenMap, extent: Extent, tile: int = 128) -> Cut:
    """Cuboids aligned to true positions; what is global stands in blocks of at most `tile` tokens."""
    queries = _cut(tokens, tokens.queries, tokens.queries, extent, tile)
    return Cut(queries, _cut(tokens, tokens.keys, tokens.own, extent, tile), extent)


def cut_latents(tokens: TokenMap, tile: int) -> Cut:
    """Each latent in even tiles of at most `tile` tokens in their order: `w` is the tile's index in its latent."""
    return cut_cuboids(_flat(tokens), (1, 1, even_tile(tokens.per_latent, tile)), tile)


def cut_positions(tokens: TokenMap, tile: int) -> Cut:
    """Neighbouring positions of a latent, each in all latents: the spatial-major order. `w` is the tile's index.

    A tile has at most `tile` tokens, unless one position in all latents is more.
    """
    width = even_tile(tokens.per_latent, max(1, tile // max(1, len(tokens.own))))
    return cut_cuboids(_flat(tokens), (tokens.keys.stop, 1, width), tile)


def even_tile(num_tokens: int, tile: int) -> int:
    """The size of tiles of nearly the same size, at most `tile`: 1560 tokens in tiles of 128 are 13 of 120."""
    return -(-num_tokens // -(-num_tokens // tile))


def spread(latents: range, count: int) -> Tensor:
    """At most `count` positions evenly spread over latents, from the first on, int64."""
    count = min(count, len(latents))
    return latents.start + torch.arange(count) * len(latents) // max(1, count)


def is_near(queries: Tensor, keys: Tensor, distance: float) -> Tensor:
    """Which pairs are nearer than a distance, or at the same place: bool [R, C]."""
    apart = (queries[:, None] - keys).abs()
    return (apart < distance) | (apart == 0)


def _flat(tokens: TokenMap) -> TokenMap:
    """The same tokens with each latent as one row."""
    return replace(tokens, height=1, width=tokens.per_latent)


def _cut(tokens: TokenMap, latents: range, placed: range, extent: Extent, tile: int) -> Cuboids:
    """Cuboids of the latents that are `placed`; all other tokens are global."""
    position = np.arange(latents.start, latents.stop)
    num_rows, num_columns = -(-tokens.height // extent[1]), -(-tokens.width // extent[2])
    in_t = np.where((position >= placed.start) & (position < placed.stop), position // extent[0], -1)[:, None, None]
    in_h, in_w = np.arange(tokens.height)[:, None] // extent[1], np.arange(tokens.width) // extent[2]
    video = np.where(in_t < 0, -1, (in_t * num_rows + in_h) * num_columns + in_w).ravel()
    place = np.pad(video, (tokens.text_before, tokens.text_behind), constant_values=-1)
    label = np.where(place < 0, -_number_runs(place < 0, tile), place)

    labels, first, block = np.unique(label, return_index=True, return_inverse=True)
    by_first = np.argsort(first)
    rank = np.argsort(by_first)
    block = rank[block]
    order = np.argsort(block, kind="stable")
    offsets = np.concatenate([[0], np.bincount(block, minlength=len(labels)).cumsum()])
    is_ordered = bool((order == np.arange(len(order))).all())
    blocks = Blocks(_row(offsets), None if is_ordered else _row(order))

    labels = labels[by_first]
    is_global = labels < 0
    index = (labels // (num_rows * num_columns), labels // num_columns % num_rows, labels % num_columns)
    t, h, w = (torch.from_numpy(np.where(is_global, -1, x)) for x in index)
    return Cuboids(blocks, t, h, w, torch.from_numpy(is_global))


def _number_runs(is_in_run: np.ndarray, tile: int) -> np.ndarray:
    """1, 2, ... for the pieces of at most `tile` tokens into which runs of True are cut; meaningless elsewhere."""
    place = np.arange(len(is_in_run))
    begins = is_in_run & ~np.concatenate([[False], is_in_run[:-1]])
    start = np.maximum.accumulate(np.where(begins, place, 0))
    return np.cumsum(is_in_run & ((place - start) % tile == 0))


def _row(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.int32))[None]
