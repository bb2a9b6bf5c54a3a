"""Spans of a unit's tokens: how they are split over ranks, and what two of them share. Plain arithmetic on slices."""

from __future__ import annotations

from itertools import pairwise


def split(num_tokens: int, num_parts: int) -> list[slice]:
    """Contiguous parts whose lengths differ by one at most; with few tokens some are empty."""
    edges = [num_tokens * i // num_parts for i in range(num_parts + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def overlap(a: slice, b: slice) -> slice:
    """The tokens of b that are in a; where there are none, empty at the nearer end of a."""
    start, stop = (min(max(edge, a.start), a.stop) for edge in (b.start, b.stop))
    return slice(start, stop)


def length(span: slice) -> int:
    count: int = span.stop - span.start
    return count
