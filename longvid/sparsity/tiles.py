"""Tiles of a film's tokens, with text, context and own latents apart, so that each can have its own rule.

Shapes: L queries, T keys, R query tiles, C key tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.kernels.layout import Blocks
from longvid.sparsity.cuboids import even_tile
from longvid.sparsity.curve import curve
from longvid.sparsity.tokens import TokenMap


@dataclass(frozen=True)
class Tiling:
    """Queries and keys in tiles.

    `visible`, bool [R, C], are the tiles that every layout keeps: the rows of text, the columns of text and of context.
    `own`, bool [R, C], are those that hold a token both as query and as key.
    """

    q: Blocks
    k: Blocks
    visible: Tensor
    own: Tensor

    @property
    def optional(self) -> Tensor:
        """The columns that may be skipped, bool [C]."""
        return ~self.visible.all(0)

    @property
    def num_optional(self) -> int:
        return int(self.optional.sum())


def own_keys(tokens: TokenMap) -> slice:
    """The keys that may be skipped: of latents that the chunk owns."""
    first = tokens.text_before - tokens.keys.start * tokens.per_latent
    return slice(first + tokens.own.start * tokens.per_latent, first + tokens.own.stop * tokens.per_latent)


def latent_queries(tokens: TokenMap) -> slice:
    """The queries that may skip keys: all but text."""
    return slice(tokens.text_before, tokens.num_queries - tokens.text_behind)


def density_of(tokens: TokenMap, chosen: float) -> float:
    """The density where the queries of latents see a share of the own keys, beside text and context."""
    skipped = (1 - chosen) * len(tokens.queries) * len(tokens.own) * tokens.per_latent**2
    return 1 - skipped / (tokens.num_queries * tokens.num_keys)


def share_of_tokens(tokens: TokenMap, scores: float) -> float:
    """What takes for each query and each key as long as so many scores of attention, as a share of all scores."""
    return scores * (tokens.num_queries + tokens.num_keys) / (tokens.num_queries * tokens.num_keys)


def share_of_mass(mass: float) -> float:
    """The expected share of the keys that hold a share of the attention: Sparse VideoGen 2's 0.25 for 0.9, 1 for 1."""
    return math.pow(mass, 13)


def at_origin(tokens: TokenMap) -> TokenMap:
    """The same tokens with keys from latent 0: what chunks have in common that differ in their place alone."""
    return tokens.moved(-tokens.keys.start)


def tiling(tokens: TokenMap, size: int, device: torch.device, *, on_curve: bool = False) -> Tiling:
    """Tiles of at most `size` tokens: in film order, or along a curve through latents, rows and columns."""
    return _tiling(at_origin(tokens), size, device, on_curve)


@functools.lru_cache(maxsize=32)
def _tiling(tokens: TokenMap, size: int, device: torch.device, on_curve: bool) -> Tiling:
    q, q_text, _ = _tiles(tokens, tokens.queries, size, on_curve)
    k, k_text, context = _tiles(tokens, tokens.keys, size, on_curve)
    visible = q_text[:, None] | k_text | context
    own = torch.zeros_like(visible)
    queries = torch.arange(tokens.num_queries)[latent_queries(tokens)]
    twins = queries + tokens.queries.start * tokens.per_latent
    own[q.block_of(tokens.num_queries)[0, queries], k.block_of(tokens.num_keys)[0, twins]] = True
    return Tiling(q.to(device), k.to(device), visible.to(device), own.to(device))


def _tiles(tokens: TokenMap, latents: range, size: int, on_curve: bool) -> tuple[Blocks, Tensor, Tensor]:
    """Tiles of text and latents, and which of them are text, and context."""
    order: list[Tensor] = []
    edges, is_text, is_context = [0], [], []
    for count, text, own in _spans(tokens, latents):
        first = edges[-1]
        num_tokens = count if text else count * tokens.per_latent
        shape = (1, 1, count) if text else (count, tokens.height, tokens.width)
        order.append(first + (curve(*shape) if on_curve else torch.arange(num_tokens)))
        step = even_tile(num_tokens, size)
        stops = [first + min(stop, num_tokens) for stop in range(step, num_tokens + step, step)]
        edges += stops
        is_text += [text] * len(stops)
        is_context += [not text and not own] * len(stops)
    offsets = torch.tensor([edges], dtype=torch.int32)
    blocks = Blocks(offsets, torch.cat(order).int()[None] if on_curve else None)
    return blocks, torch.tensor(is_text), torch.tensor(is_context)


def _spans(tokens: TokenMap, latents: range) -> Iterator[tuple[int, bool, bool]]:
    """Number of tokens or latents, whether they are text, whether the chunk owns them; in the order of the tokens."""
    start = min(max(tokens.own.start, latents.start), latents.stop)
    stop = min(max(tokens.own.stop, start), latents.stop)
    spans = [
        (tokens.text_before, True, False),
        (start - latents.start, False, False),
        (stop - start, False, True),
        (latents.stop - stop, False, False),
        (tokens.text_behind, True, False),
    ]
    yield from (span for span in spans if span[0])
