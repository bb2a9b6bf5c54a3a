"""A space-filling curve through a grid of any size: Hilbert's, generalised as J. Červený's Gilbert curve is.

A box is crossed from its corner to the far end of its first side. It is cut into boxes that are crossed one behind the
other, until a line is left. A side is a vector along one axis; near a corner, all sides count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

Vector = tuple[int, int, int]
Box = tuple[Vector, Vector, Vector, Vector]
"""The corner where it is entered, the side along which it is crossed, and the two other sides."""


@functools.lru_cache(maxsize=16)
def curve(depth: int, height: int, width: int) -> Tensor:
    """The cells of a grid along the curve: int64 [cells] indices, cell (t, y, x) being (t · height + y) · width + x.

    Neighbours on the curve are neighbours in the grid. Where a side is odd, a few steps go diagonally.
    """
    sides = [(depth, 0, 0), (0, height, 0), (0, 0, width)]
    a, b, c = sorted(sides, key=sum, reverse=True)
    cells = torch.tensor(list(_walk(((0, 0, 0), a, b, c))), dtype=torch.int64).view(-1, 3)
    return cells @ torch.tensor([height * width, width, 1])


def _walk(box: Box) -> Iterator[Vector]:
    """The cells of a box, in order."""
    corner, *sides = box
    long = max(sides, key=_length)
    num_cells = math.prod(map(_length, sides))
    if num_cells == _length(long):
        yield from (_add(corner, _times(_unit(long), i)) for i in range(num_cells))
    elif num_cells:
        for part in _cut(box):
            yield from _walk(part)


def _cut(box: Box) -> list[Box]:
    """The boxes that cross a box: the end of each lies beside the corner of the next."""
    corner, a, b, c = box
    long, high, deep = _length(a), _length(b), _length(c)
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    c0, c1 = _halves(c)
    if 2 * long > 3 * max(high, deep):  # long: two behind each other
        return [(corner, a0, b, c), (_add(corner, a0), a1, b, c)]
    far_a = _add(corner, _last(a))
    if 3 * high > 4 * deep:  # flat: up, along, and down
        return [
            (corner, b0, c, a0),
            (_add(corner, b0), a, b1, c),
            (_add(far_a, _last(b0)), _minus(b0), c, _minus(a1)),
        ]
    if 3 * deep > 4 * high:
        return [
            (corner, c0, a0, b),
            (_add(corner, c0), a, b, c1),
            (_add(far_a, _last(c0)), _minus(c0), _minus(a1), b),
        ]
    return [
        (corner, b0, c0, a0),
        (_add(corner, b0), c, a0, b1),
        (_add(corner, _last(b0), _last(c)), a, _minus(b0), _minus(c1)),
        (_add(far_a, b0, _last(c)), _minus(c), _minus(a1), b1),
        (_add(far_a, _last(b0)), _minus(b0), c0, _minus(a1)),
    ]


def _halves(side: Vector) -> tuple[Vector, Vector]:
    """A side in two; the first half is even where it can be, so that the curve ends where the next box begins."""
    length = _length(side)
    half = length // 2
    if half % 2 and length > 2:
        half += 1
    first = _times(_unit(side), half)
    return first, _add(side, _minus(first))


def _length(side: Vector) -> int:
    return abs(sum(side))


def _unit(side: Vector) -> Vector:
    x, y, z = ((n > 0) - (n < 0) for n in side)
    return x, y, z


def _last(side: Vector) -> Vector:
    """From the first cell along a side to its last."""
    return _add(side, _minus(_unit(side)))


def _add(*vectors: Vector) -> Vector:
    x, y, z = (sum(parts) for parts in zip(*vectors, strict=True))
    return x, y, z


def _times(vector: Vector, factor: int) -> Vector:
    return vector[0] * factor, vector[1] * factor, vector[2] * factor


def _minus(vector: Vector) -> Vector:
    return _times(vector, -1)
