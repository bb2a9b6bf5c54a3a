"""The Wan VAE's decoder, made for a CPU: diffusers' weights and arithmetic, channels last.

Differs from diffusers' modules by rounding alone. What makes it faster: where the processor has matrix
units, a convolution is one pass of ours with its norm, activation and residual (``kernels/convolve.py``).
Elsewhere oneDNN's convolutions are at their best channels last; norm and activation write straight into
the input of the next convolution, behind the frames kept from the pass before, so nothing is padded or
joined. A convolution of an image that was doubled in size by repetition works on the image before that.

Shapes: T frames, H height, W width, C channels; activations are contiguous [T, H, W, C].
"""

from __future__ import annotations

import math
from itertools import product
from typing import TypeAlias

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    DupUp3D,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    WanUpBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from longvid.kernels import convolve, rows
from longvid.kernels.convolve import NOTHING, Around, Spread
from longvid.models.sizes import CELLS_AT_ONCE

State: TypeAlias = list[Tensor | list[Tensor] | str | None]
"""diffusers' cache: for each causal convolution over time the last inputs [1, C, 2, H, W], None before the first.

A decoder that works in bands of rows keeps a list of them, a band each.
"""

REPEAT = "Rep"
"""What the cache holds for a temporal upsampling that has seen the shot's first latent alone."""


class ChannelsLastDecoder:
    """``post_quant_conv`` and decoder of a VAE, whose the weights stay.

    For matrix units it packs copies, each when it is first used; else it lays the weights out anew in place.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        decoder, scratch = vae.decoder, _Scratch()
        self._has_units = convolve.suits(vae.post_quant_conv.weight.detach())
        self.release = scratch.release
        """Gives back the memory that is kept from pass to pass."""
        self._post_quant = Convolution(vae.post_quant_conv)
        self.conv_in = CausalConvolution(decoder.conv_in, scratch)
        mid = decoder.mid_block
        self.mid: list[ResidualBlock | _Attention] = [ResidualBlock(mid.resnets[0], scratch)]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            self.mid += [_Attention(attention), ResidualBlock(resnet, scratch)]
        self.up = [UpBlock(block, scratch) for block in decoder.up_blocks]
        self.conv_out = CausalConvolution(decoder.conv_out, scratch, decoder.norm_out)

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need.

        A shot's first latent must come alone, with ``first_chunk`` and a state of None.
        """
        cache = self._open(state)
        x = self.enter(latents, cache)
        for block in self.up:
            x = block(x, cache, first_chunk)
        return as_ncthw(self.conv_out(x, cache))

    def at_once(self, cells: int) -> int:
        """How many latents of so many cells it should be given in a pass. Bits do not depend on it."""
        return max(1, CELLS_AT_ONCE // cells) if self._has_units else 1

    def _open(self, state: State) -> Cache:
        return Cache(state)

    def enter(self, latents: Tensor, cache: Cache) -> Tensor:
        """What works on latents: all up to the attention within frames, and behind it. [F, h, w, C']."""
        x = self.conv_in(self._post_quant(latents[0].permute(1, 2, 3, 0).contiguous()), cache)
        for layer in self.mid:
            x = layer(x, cache)
        return x


class Cache:
    """The entries of a state one after the other, as the convolutions come to them.

    It also knows what lies around the rows at hand; here they are all of the image, with zeros around it.
    """

    halo = 0
    """Rows above and below those at hand that `fill_halo` gives a convolution; 0: it pads the image itself."""

    def __init__(self, state: State) -> None:
        self._state = state
        self.position = 0

    def exchange(self, x: Tensor, depth: int) -> None:
        """Fill the first ``depth`` frames of x [depth + T, H, W, C] from the cache, and keep its last ones there."""
        kept = self._state[self.position]
        x[:depth].zero_()
        if isinstance(kept, Tensor):
            x[depth - kept.shape[2] : depth] = kept[0].permute(1, 2, 3, 0)
        self.keep(as_ncthw(x[-depth:].clone()))

    def past(self, depth: int) -> Tensor | None:
        """The frames that a convolution kept [depth, H, W, C]; None: zeros."""
        kept = self._state[self.position]
        if not isinstance(kept, Tensor):
            return None
        frames = kept[0].permute(1, 2, 3, 0)
        missing = depth - len(frames)
        return torch.cat([frames.new_zeros(missing, *frames.shape[1:]), frames]) if missing else frames

    def around(self, x: Tensor, past: Tensor | None, depth: int) -> Around:
        """What lies above and below the rows at hand of x [T, H, W, C], behind ``depth`` frames of the past."""
        return NOTHING

    def keep(self, entry: Tensor | str) -> None:
        self._state[self.position] = entry
        self.position += 1

    def fill_halo(self, x: Tensor) -> None:
        """Fill the first and the last `halo` rows of x [T, halo + H + halo, W, C] with what lies around the others."""

    def gather(self, x: Tensor) -> Tensor:
        """All rows of the image, of those at hand."""
        return x

    def own(self, x: Tensor) -> Tensor:
        """Those at hand, of all rows."""
        return x


class _Scratch:
    """Memory for the input of one convolution at a time: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised [*shape] of another tensor's dtype and device, valid until the next call."""
        count = math.prod(shape)
        kept = self._values
        if kept.numel() < count or kept.dtype != like.dtype or kept.device != like.device:
            self._values = like.new_empty(count)
        return self._values[:count].view(shape)

    def release(self) -> None:
        """Have none until the next call."""
        self._values = torch.empty(0)


class Convolution:
    """A convolution within frames, padded with zeros."""

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        weight = conv.weight if isinstance(conv, nn.Conv3d) else conv.weight[:, :, None]
        self._fused = _fused(weight, _bias(conv))
        self._weights = None if self._fused else (_laid_out(conv), _bias(conv))
        self.num_weights = weight.numel()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [T, H, W, C] to [T, H, W, O], with a residual of that shape added."""
        if self._fused:
            return self._fused(x, residual=residual)
        assert self._weights is not None
        weight, bias = self._weights
        y = convolve_by_torch(x, weight, bias, [size // 2 for size in weight.shape[2:]])
        return y if residual is None else y.add_(residual)


class CausalConvolution:
    """A convolution over the frames so far, after norm and SiLU if it has a norm.

    With `Spread.FRAMES` of twice the outputs, which become twice the frames.
    """

    def __init__(
        self,
        conv: WanCausalConv3d,
        scratch: _Scratch,
        norm: WanRMS_norm | None = None,
        spread: Spread = Spread.NONE,
    ) -> None:
        self._norm = None if norm is None else _Norm(norm)
        self.fused = _fused(conv.weight, _bias(conv), spread, None if self._norm is None else self._norm.gain)
        self.weight = conv.weight.detach() if self.fused else _laid_out(conv)
        self.bias, self._spread, self._scratch = _bias(conv), spread, scratch
        self.depth = self.weight.shape[2] - 1
        """Frames of the past that it sees."""
        self.edge_rows, self._edge_columns = (size // 2 for size in self.weight.shape[3:])
        """Rows that it sees above and below each."""

    @property
    def num_weights(self) -> int:
        return self.weight.numel()

    def __call__(self, x: Tensor, cache: Cache, residual: Tensor | None = None) -> Tensor:
        """x [T, H, W, C] to [T, H, W, O], with a residual of that shape added."""
        if self.fused:
            past = cache.past(self.depth)
            around = cache.around(x, past, self.depth) if self.edge_rows else NOTHING
            kept = x.new_empty(self.depth, *x.shape[1:])
            y = self.fused(x, past, kept=kept, around=around, residual=residual)
            cache.keep(as_ncthw(kept))
            return y
        num_frames, height, *rest = x.shape
        halo = min(cache.halo, self.edge_rows)
        inputs = self._scratch.empty((self.depth + num_frames, halo + height + halo, *rest), x)
        rows = inputs[:, halo : halo + height]
        self.fill(x, rows)
        cache.exchange(rows, self.depth)
        if halo:
            cache.fill_halo(inputs)
        padding = [0, self.edge_rows - halo, self._edge_columns]
        y = self.spread(convolve_by_torch(inputs, self.weight, self.bias, padding))
        return y if residual is None else y.add_(residual)

    def fill(self, x: Tensor, inputs: Tensor) -> None:
        """Write x to the last frames of the convolution's input, through norm and SiLU if it has a norm."""
        if self._norm is None:
            inputs[self.depth :] = x
        else:
            self._norm(x, inputs[self.depth :], silu=True)

    def spread(self, y: Tensor) -> Tensor:
        """[T, H, W, 2 C] as [2 T, H, W, C], if its outputs become frames."""
        if self._spread is Spread.NONE:
            return y
        frames: Tensor = y.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        return frames


class _Norm:
    """RMS norm over the channels."""

    def __init__(self, norm: WanRMS_norm) -> None:
        self.gain = (norm.gamma.detach() * norm.scale).flatten()

    def __call__(self, x: Tensor, out: Tensor, silu: bool) -> None:
        """Write the norm of x [T, H, W, C] to ``out``, whose frames are contiguous, through SiLU if asked for."""
        if out.is_contiguous():
            rows.unit_norm(x, self.gain, out, silu=silu)
            return
        for frame, result in zip(x, out, strict=True):
            rows.unit_norm(frame, self.gain, result, silu=silu)


class ResidualBlock:
    def __init__(self, block: WanResidualBlock, scratch: _Scratch) -> None:
        self.conv1 = CausalConvolution(block.conv1, scratch, block.norm1)
        self.conv2 = CausalConvolution(block.conv2, scratch, block.norm2)
        self.shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else Convolution(block.conv_shortcut)

    @property
    def num_inputs(self) -> int:
        """Channels of what comes to it."""
        return self.conv1.weight.shape[1]

    @property
    def num_weights(self) -> int:
        shortcut = 0 if self.shortcut is None else self.shortcut.num_weights
        return self.conv1.num_weights + self.conv2.num_weights + shortcut

    def __call__(self, x: Tensor, cache: Cache) -> Tensor:
        y = self.conv1(x, cache)
        return self.conv2(y, cache, x if self.shortcut is None else self.shortcut(x))


class _Attention:
    """Attention within each frame, one head."""

    def __init__(self, block: WanAttentionBlock) -> None:
        self._norm = _Norm(block.norm)
        self._qkv, self._proj = Convolution(block.to_qkv), Convolution(block.proj)

    def __call__(self, x: Tensor, cache: Cache) -> Tensor:
        normed = torch.empty_like(x)
        self._norm(x, normed, silu=False)
        # Whoever has some rows attends for all: it is little work, and how many queries there are decides the rounding.
        whole = cache.gather(normed)
        num_frames, height, width, channels = whole.shape
        qkv = self._qkv(whole)
        q, k, v = qkv.view(num_frames, 1, height * width, 3 * channels).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).reshape(whole.shape)
        return self._proj(cache.own(y).contiguous(), x)


class UpBlock:
    """Residual blocks, then an upsampling if the block has one: Wan 2.1's, and Wan 2.2's with a shortcut around all."""

    def __init__(self, block: WanUpBlock | WanResidualUpBlock, scratch: _Scratch) -> None:
        if isinstance(block, WanResidualUpBlock):
            resample, shortcut = block.upsampler, block.avg_shortcut
        else:
            resample, shortcut = block.upsamplers[0] if block.upsamplers else None, None
        self.resnets = [ResidualBlock(resnet, scratch) for resnet in block.resnets]
        self.upsample = None if resample is None else Upsample(resample, scratch)
        self.shortcut = None if shortcut is None else _Shortcut(shortcut)

    def __call__(self, x: Tensor, cache: Cache, first_chunk: bool) -> Tensor:
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.upsample is None:
            return y
        if self.shortcut is None:
            return self.upsample(y, cache, first_chunk)
        if self.upsample.fused and self.shortcut.same_channels:
            return self.upsample(y, cache, first_chunk, x)
        return self.shortcut.add_to(self.upsample(y, cache, first_chunk), x)


class Upsample:
    """Twice the frames, if the module says so and not for a shot's first latent; then twice the height and width.

    Convolving an image whose pixels stand twice in each direction with a 3x3 kernel is convolving the
    image itself with a 2x2 kernel for each of the four pixels that one becomes: the kernel's rows and
    columns that meet the same pixel are added. It takes 4/9 of the multiplications.
    """

    def __init__(self, resample: WanResample, scratch: _Scratch) -> None:
        in_time = resample.mode == "upsample3d"
        self.time_conv = CausalConvolution(resample.time_conv, scratch, spread=Spread.FRAMES) if in_time else None
        conv = resample.resample[1]
        kernels = [_halved(_halved(conv.weight.detach().float(), 2, i), 3, j) for i, j in product((0, 1), (0, 1))]
        weight = torch.cat(kernels)[:, :, None].to(conv.weight.dtype)
        self.bias, self.num_weights = conv.bias.detach().repeat(4), weight.numel()
        self.fused = _fused(weight, self.bias, Spread.IMAGE)
        self.weight = weight if self.fused else _channels_last(weight)

    def __call__(self, x: Tensor, cache: Cache, first_chunk: bool, around: Tensor | None = None) -> Tensor:
        """``around`` [T, H, W, C] is added to all that each pixel of x [T, H, W, C] becomes; matrix units alone do."""
        if self.time_conv is not None:
            if first_chunk:
                cache.keep(REPEAT)
            else:
                x = self.time_conv(x, cache)
        if self.fused:
            return self.fused(x, around=cache.around(x, None, 0), residual=around)
        assert around is None
        num_frames, height, width, channels = x.shape
        halo = cache.halo
        if halo:
            rows = x.new_empty(num_frames, halo + height + halo, width, channels)
            rows[:, halo : halo + height] = x
            cache.fill_halo(rows)
            x = rows
        return interleave(convolve_by_torch(x, self.weight, self.bias, [0, 1 - halo, 1]), height, width)


def interleave(y: Tensor, height: int, width: int) -> Tensor:
    """Four pixels' values [T, height + 1, width + 1, 4 C] as an image [T, 2 height, 2 width, C]."""
    y = y.unflatten(3, (2, 2, -1))
    out = y.new_empty(len(y), height, 2, width, 2, y.shape[-1])
    for i, j in product((0, 1), (0, 1)):
        out[:, :, i, :, j] = y[:, i : i + height, j : j + width, i, j]
    image: Tensor = out.view(len(y), 2 * height, 2 * width, -1)
    return image


class _Shortcut:
    """Each value becomes the same value in twice the height, width and, it may be, frames."""

    def __init__(self, dup: DupUp3D) -> None:
        self._times = dup.factor_t
        channels = torch.arange(dup.out_channels * dup.factor) // dup.repeats
        """Input channel of each output channel, time, row and column."""
        self._channels = channels.view(dup.out_channels, dup.factor_t, 2, 2)
        self.same_channels = dup.in_channels == dup.out_channels

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x [T, H, W, C] to y [T' T, 2 H, 2 W, C'] in place; a first latent has the last of the T' times alone."""
        num_frames, height, width, _ = x.shape
        times = y.shape[0] // num_frames
        cells = y.view(num_frames, times, height, 2, width, 2, -1)
        for t, i, j in product(range(times), (0, 1), (0, 1)):
            channels = self._channels[:, self._times - times + t, i, j]
            cells[:, t, :, i, :, j] += x if self.same_channels else x[..., channels]
        return y


def _halved(kernel: Tensor, dim: int, phase: int) -> Tensor:
    """A kernel of 3 over repeated pixels as one of 2 over the pixels, for the first or second of a pixel's copies."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim)


def _fused(
    weight: Tensor, bias: Tensor, spread: Spread = Spread.NONE, gain: Tensor | None = None
) -> convolve.Convolution | None:
    """With norm, activation and residual in one, where there are matrix units."""
    weight = weight.detach()
    return convolve.Convolution(weight, bias, spread, gain) if convolve.suits(weight) else None


def convolve_by_torch(x: Tensor, weight: Tensor, bias: Tensor, padding: list[int]) -> Tensor:
    """Convolve x [T, H, W, C] with ones as strides. For one clip torch would take its plain fp32 kernel, not oneDNN."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        y = torch.mkldnn_convolution(as_ncthw(x), weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
    else:
        y = F.conv3d(as_ncthw(x), weight, bias, padding=padding)
    return y[0].permute(1, 2, 3, 0).contiguous()


def _bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert conv.bias is not None, "Wan's convolutions have a bias"
    return conv.bias.detach()


def _laid_out(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """Its weights [O, I, t, h, w], laid out anew in place."""
    if isinstance(conv, nn.Conv2d):
        return _channels_last(conv.weight.detach()[:, :, None])
    conv.weight.data = _channels_last(conv.weight.detach())
    return conv.weight.detach()


def _channels_last(weight: Tensor) -> Tensor:
    """[O, I, t, h, w] with I innermost, in strides that say so for kernels of one pixel too."""
    return weight.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)


def as_ncthw(x_THWC: Tensor) -> Tensor:
    """A view [1, C, T, H, W]."""
    return x_THWC[None].permute(0, 4, 1, 2, 3)
