"""The Wan VAE's decoder in bands of rows, from the top: the frames of a whole decode, in less memory.

Up to the attention in its middle the decoder works on latents, which are small, and the attention sees all of a frame:
so far it runs whole. From there on a convolution sees one row above and one below, so a band gives what its rows allow:
all but the last row, which waits for the next band. Each layer keeps the last two rows that came to it, and what goes
around a layer waits for what goes through it. Nothing is computed twice, and no band is blended with another: only
oneDNN's rounding depends on the size of a band, where there are no matrix units.

Shapes as in ``longvid.models.wan_vae_layers``: activations are [T, H, W, C], H the rows of a band.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.models.wan_vae_layers import (
    REPEAT,
    Cache,
    CausalConvolution,
    ChannelsLastDecoder,
    ResidualBlock,
    State,
    UpBlock,
    Upsample,
    as_ncthw,
    convolve_by_torch,
    interleave,
)


class BandedDecoder(ChannelsLastDecoder):
    """Decodes `rows` rows of latents at a time behind the attention; a state has each band's rows on their own."""

    def __init__(self, vae: AutoencoderKLWan, rows: int) -> None:
        super().__init__(vae)
        self._rows = rows

    def at_once(self, cells: int) -> int:
        """One: it is there for memory."""
        return 1

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        cache = Cache(state)
        x = self.enter(latents, cache)
        bands = x.split(self._rows, dim=1)
        lines: list[Tensor | None] = []
        images = []
        for number, rows in enumerate(bands):
            band = _Band(state, cache.position, lines, number, is_last=number == len(bands) - 1)
            y = rows.contiguous()
            for block in self.up:
                y = _up(block, y, band, first_chunk)
            images.append(_convolution(self.conv_out, y, band))
        return as_ncthw(torch.cat(images, dim=1))


class _Band:
    """What the layers keep from pass to pass (of this band) and from band to band, in the order in which they ask."""

    def __init__(self, state: State, position: int, lines: list[Tensor | None], number: int, *, is_last: bool) -> None:
        self._state, self._position = state, position
        self._lines, self._next_line = lines, 0
        self._number = number
        self.is_first, self.is_last = number == 0, is_last

    def exchange(self, x: Tensor, depth: int) -> None:
        """Fill the first ``depth`` frames of x [depth + T, H, W, C] with the pass before's last, and keep x's last."""
        kept = self._state[self._position]
        pieces = kept if isinstance(kept, list) else []
        x[:depth].zero_()
        if self._number < len(pieces):
            x[:depth] = pieces[self._number][0].permute(1, 2, 3, 0)
        last = as_ncthw(x[-depth:].clone())
        self._state[self._position] = [*pieces[: self._number], last, *pieces[self._number + 1 :]]
        self._position += 1

    def repeat(self) -> None:
        """Of a temporal upsampling that sees a shot's first latent."""
        self._state[self._position] = REPEAT
        self._position += 1

    def between(self, x: Tensor) -> Tensor:
        """Rows behind the last two of the band before; at the image's ends with a row of zeros."""
        edge = x.new_zeros(len(x), 1, *x.shape[2:])
        above = self._take()
        parts = [edge if above is None else above, x]
        if self.is_last:
            parts.append(edge)
        rows = torch.cat(parts, dim=1)
        self._keep(rows[:, -2:])
        return rows

    def delayed(self, x: Tensor, count: int) -> Tensor:
        """The next ``count`` of the rows that have come so far."""
        waiting = self._take()
        rows = x if waiting is None else torch.cat([waiting, x], dim=1)
        self._keep(rows[:, count:])
        return rows[:, :count]

    def _take(self) -> Tensor | None:
        if self.is_first:
            self._lines.append(None)
        return self._lines[self._next_line]

    def _keep(self, rows: Tensor) -> None:
        self._lines[self._next_line] = None if self.is_last else rows.clone()
        self._next_line += 1


def _convolution(layer: CausalConvolution, x: Tensor, band: _Band) -> Tensor:
    depth, edge = layer.depth, layer.edge_rows
    inputs = x.new_empty(depth + len(x), *x.shape[1:])
    layer.fill(x, inputs)
    band.exchange(inputs, depth)
    rows = band.between(inputs) if edge else inputs
    inner = range(edge, rows.shape[1] - edge)
    if not inner:
        return layer.spread(x.new_empty(len(x), 0, x.shape[2], layer.weight.shape[0]))
    if layer.fused:
        return layer.fused(rows[depth:], rows[:depth], rows=inner, is_normed=True)
    return layer.spread(convolve_by_torch(rows, layer.weight, layer.bias, [0, 0, layer.weight.shape[4] // 2]))


def _residual(block: ResidualBlock, x: Tensor, band: _Band) -> Tensor:
    y = _convolution(block.conv2, _convolution(block.conv1, x, band), band)
    around = band.delayed(x, y.shape[1]).contiguous()
    if not y.shape[1]:
        return y
    return y.add_(around if block.shortcut is None else block.shortcut(around))


def _up(block: UpBlock, x: Tensor, band: _Band, first_chunk: bool) -> Tensor:
    y = x
    for resnet in block.resnets:
        y = _residual(resnet, y, band)
    if block.upsample is None:
        return y
    y = _upsample(block.upsample, y, band, first_chunk)
    if block.shortcut is None:
        return y
    around = band.delayed(x, y.shape[1] // 2)
    return block.shortcut.add_to(y, around) if y.shape[1] else y


def _upsample(layer: Upsample, x: Tensor, band: _Band, first_chunk: bool) -> Tensor:
    if layer.time_conv is not None:
        if first_chunk:
            band.repeat()
        else:
            x = _convolution(layer.time_conv, x, band)
    rows = band.between(x)
    height = rows.shape[1] - 2
    if height < 1:
        return x.new_empty(len(x), 0, 2 * x.shape[2], layer.bias.shape[0] // 4)
    if layer.fused:
        return layer.fused(rows, rows=range(1, 1 + height))
    return interleave(convolve_by_torch(rows, layer.weight, layer.bias, [0, 0, 1]), height, x.shape[2])
