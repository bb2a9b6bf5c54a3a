"""The Wan VAE's decoder with its rows dealt out to the ranks of a group, which decode every latent together.

Each has a band of the latent's rows and, in every layer, of what becomes of them. A convolution that sees three rows is
given one row of the band above and one of the band below, or zeros at the image's ends. What it keeps of the past is of
its own rows, so state and activations of a rank fall with the number of ranks. The attention in the middle sees the
whole frame, which is no larger than a latent there: its input is gathered, and every rank computes all of it.

Nothing is computed otherwise than in a whole decode but for the height of what a convolution is given.

Shapes as in ``longvid.models.wan_vae_layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.kernels.convolve import Around
from longvid.models.wan_vae_layers import Cache, ChannelsLastDecoder, State, as_ncthw
from longvid.parallel.collectives import Group


@dataclass(frozen=True)
class Bands:
    """How a group shares the `height` rows of a latent: contiguous bands, as even as can be, in the group's order.

    Where there are fewer rows than members, the last members have none, and take part in nothing.

    All tensors here have, along `dim`, the same number of rows for each row of the latent.
    """

    group: Group
    height: int

    @property
    def num_busy(self) -> int:
        """The members that have rows: the first ones."""
        return min(self.group.size, self.height)

    @property
    def own(self) -> range:
        """The latent's rows that this member has."""
        return self.of(self.group.index)

    def of(self, member: int) -> range:
        """The latent's rows that a member has."""
        busy = self.num_busy
        return range(*(self.height * min(i, busy) // busy for i in (member, member + 1)))

    def deal(self, whole: Tensor, dim: int) -> Tensor:
        """This member's rows of the first one's tensor; those of the others say the shape alone."""
        sizes = [len(self.of(member)) * (whole.shape[dim] // self.height) for member in range(self.group.size)]
        index = self.group.index
        if index == 0:
            parts: Sequence[Tensor] = torch.split(whole, sizes, dim)
            self.group.trade({member: parts[member] for member in range(1, self.num_busy)}, {})()
            return parts[0]
        own = whole.new_empty(*whole.shape[:dim], sizes[index], *whole.shape[dim + 1 :])
        self.group.trade({}, {0: own} if sizes[index] else {})()
        return own

    def collect(self, own: Tensor, dim: int) -> Tensor:
        """The first member gets the rows of all; the others keep their own."""
        if self.group.index:
            self.group.trade({0: own} if self.own else {}, {})()
            return own
        takes = {member: self._empty(member, own, dim) for member in range(1, self.num_busy)}
        self.group.trade({}, takes)()
        return torch.cat([own, *takes.values()], dim)

    def gather(self, own: Tensor, dim: int) -> Tensor:
        """Every member that has rows gets the rows of all."""
        others = [member for member in range(self.num_busy) if member != self.group.index]
        parts = {member: self._empty(member, own, dim) for member in others}
        self.group.trade(dict.fromkeys(others, own), parts)()
        parts[self.group.index] = own
        return torch.cat([parts[member] for member in range(self.num_busy)], dim)

    def around(self, first: Tensor, last: Tensor) -> Around:
        """The last rows [T, W, C] of the band above and the first of the one below, for this one's first and last."""
        above, below = self.group.index - 1, self.group.index + 1
        gives = {above: first} if above >= 0 else {}
        gives |= {below: last} if below < self.num_busy else {}
        takes = {member: torch.empty_like(row, memory_format=torch.contiguous_format) for member, row in gives.items()}
        self.group.trade(gives, takes)()
        return Around(takes.get(above), takes.get(below))

    def fill_halo(self, x: Tensor) -> None:
        """Fill the first and last row of x [T, 1 + H + 1, W, C] with the next ones of the bands above and below."""
        rows = self.around(x[:, 1], x[:, -2])
        x[:, 0] = 0.0 if rows.above is None else rows.above
        x[:, -1] = 0.0 if rows.below is None else rows.below

    def _empty(self, member: int, like: Tensor, dim: int) -> Tensor:
        rows = like.shape[dim] // len(self.own) * len(self.of(member))
        return like.new_empty(*like.shape[:dim], rows, *like.shape[dim + 1 :])


class SharedDecoder(ChannelsLastDecoder):
    """Decodes the rows of one member of a group, whose other members do the same with theirs at the same time."""

    def __init__(self, vae: AutoencoderKLWan, group: Group) -> None:
        super().__init__(vae)
        self._group = group
        self.bands = Bands(group, 0)

    def share(self, height: int) -> Bands:
        """Have latents of so many rows come from here on; how they are shared."""
        self.bands = Bands(self._group, height)
        return self.bands

    def at_once(self, cells: int) -> int:
        """One, for members have different numbers of cells, and all must make the same exchanges."""
        return 1

    def _open(self, state: State) -> Cache:
        return _BandCache(state, self.bands)


class _BandCache(Cache):
    """The cache of a band, around which lie those of other ranks."""

    halo = 1

    def __init__(self, state: State, bands: Bands) -> None:
        super().__init__(state)
        self._bands = bands

    def fill_halo(self, x: Tensor) -> None:
        self._bands.fill_halo(x)

    def around(self, x: Tensor, past: Tensor | None, depth: int) -> Around:
        before = x.new_zeros(depth, *x.shape[1:]) if past is None else past
        first, last = (torch.cat([before[:, row], x[:, row]]) for row in (0, -1))
        return self._bands.around(first, last)

    def gather(self, x: Tensor) -> Tensor:
        return self._bands.gather(x, dim=1)

    def own(self, x: Tensor) -> Tensor:
        rows = self._bands.own
        return x[:, rows.start : rows.stop]


def rows_of(entry: Tensor, has: range, wanted: range) -> Tensor:
    """Of an entry of a state [1, C, 2, H, W], which holds some of the latent's rows, some others that lie within."""
    unit = entry.shape[3] // len(has)
    rows = slice((wanted.start - has.start) * unit, (wanted.stop - has.start) * unit)
    return as_ncthw(entry[0, :, :, rows].permute(1, 2, 3, 0).contiguous())
