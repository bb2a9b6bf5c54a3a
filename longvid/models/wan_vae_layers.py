"""The Wan VAE's decoder for a CPU: diffusers' weights and arithmetic, channels last.

Differs from diffusers' modules by rounding alone. What makes it faster: oneDNN's convolutions are at
their best channels last; norm and activation write straight into the input of the next convolution,
behind the frames kept from the pass before, so nothing is padded or joined; a convolution of an image
that was doubled in size by repetition works on the image before that.

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

State: TypeAlias = list[Tensor | str | None]
"""diffusers' cache: for each causal convolution over time the last inputs [1, C, 2, H, W], None before the first."""

REPEAT = "Rep"
"""What the cache holds for a temporal upsampling that has seen the shot's first latent alone."""

_TILE_VALUES = 2**18
"""Values that elementwise work takes at a time, so that they stay in the core's cache."""


class ChannelsLastDecoder:
    """``post_quant_conv`` and decoder of a VAE on the CPU. Lays the weights out anew in place; they stay the VAE's."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        decoder, scratch = vae.decoder, _Scratch()
        self._post_quant = _Convolution(vae.post_quant_conv)
        self._conv_in = _CausalConvolution(decoder.conv_in, scratch)
        mid = decoder.mid_block
        self._mid: list[_ResidualBlock | _Attention] = [_ResidualBlock(mid.resnets[0], scratch)]
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            self._mid += [_Attention(attention), _ResidualBlock(resnet, scratch)]
        self._up = [_UpBlock(block, scratch) for block in decoder.up_blocks]
        self._conv_out = _CausalConvolution(decoder.conv_out, scratch, decoder.norm_out)

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need.

        A shot's first latent must come alone, with ``first_chunk`` and a state of None.
        """
        x = self._post_quant(latents[0].permute(1, 2, 3, 0).contiguous())
        cache = _Cache(state)
        x = self._conv_in(x, cache)
        for layer in self._mid:
            x = layer(x, cache)
        for block in self._up:
            x = block(x, cache, first_chunk)
        return _as_ncthw(self._conv_out(x, cache))


class _Cache:
    """The entries of a state one after the other, as the convolutions come to them."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._next = 0

    def exchange(self, x: Tensor, depth: int) -> None:
        """Fill the first ``depth`` frames of x [depth + T, H, W, C] from the cache, and keep its last ones there."""
        kept = self._state[self._next]
        x[:depth].zero_()
        if isinstance(kept, Tensor):
            x[depth - kept.shape[2] : depth] = kept[0].permute(1, 2, 3, 0)
        self.keep(_as_ncthw(x[-depth:].clone()))

    def keep(self, entry: Tensor | str) -> None:
        self._state[self._next] = entry
        self._next += 1


class _Scratch:
    """Memory for the input of one convolution at a time: fresh memory costs more than what is written to it."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised [*shape], valid until the next call."""
        count = math.prod(shape)
        if self._values.numel() < count or self._values.dtype != dtype:
            self._values = torch.empty(count, dtype=dtype)
        return self._values[:count].view(shape)


class _Convolution:
    """A convolution, padded with zeros in space only."""

    def __init__(self, conv: nn.Conv3d) -> None:
        conv.weight.data = _channels_last(conv.weight.detach())
        self.weight, self.bias = conv.weight.detach(), _bias(conv)
        self._padding = [0, *(size // 2 for size in self.weight.shape[3:])]

    def __call__(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, self._padding)


class _CausalConvolution:
    """A convolution over the frames so far, after norm and SiLU if it has a norm."""

    def __init__(self, conv: WanCausalConv3d, scratch: _Scratch, norm: WanRMS_norm | None = None) -> None:
        self.conv = _Convolution(conv)
        self._norm = None if norm is None else _Norm(norm)
        self._depth = self.conv.weight.shape[2] - 1
        self._scratch = scratch

    def __call__(self, x: Tensor, cache: _Cache) -> Tensor:
        num_frames, *rest = x.shape
        inputs = self._scratch.empty((self._depth + num_frames, *rest), x.dtype)
        if self._norm is None:
            inputs[self._depth :] = x
        else:
            self._norm(x, inputs[self._depth :], silu=True)
        cache.exchange(inputs, self._depth)
        return self.conv(inputs)


class _Norm:
    """RMS norm over the channels."""

    def __init__(self, norm: WanRMS_norm) -> None:
        self._gain = (norm.gamma.detach() * norm.scale).flatten()

    def __call__(self, x: Tensor, out: Tensor, silu: bool) -> None:
        """Write the norm of x [T, H, W, C] to ``out``, through SiLU if asked for."""
        channels = x.shape[-1]
        rows = max(1, _TILE_VALUES // channels)
        for values, result in zip(x.view(-1, channels).split(rows), out.view(-1, channels).split(rows), strict=True):
            norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
            inverse = norm.clamp_min_(1e-12).reciprocal_().to(x.dtype)
            torch.mul(values, inverse, out=result).mul_(self._gain)
            if silu:
                F.silu(result, inplace=True)


class _ResidualBlock:
    def __init__(self, block: WanResidualBlock, scratch: _Scratch) -> None:
        self._conv1 = _CausalConvolution(block.conv1, scratch, block.norm1)
        self._conv2 = _CausalConvolution(block.conv2, scratch, block.norm2)
        self._shortcut = None if isinstance(block.conv_shortcut, nn.Identity) else _Convolution(block.conv_shortcut)

    def __call__(self, x: Tensor, cache: _Cache) -> Tensor:
        y = self._conv2(self._conv1(x, cache), cache)
        return y.add_(x if self._shortcut is None else self._shortcut(x))


class _Attention:
    """Attention within each frame, one head."""

    def __init__(self, block: WanAttentionBlock) -> None:
        self._norm = _Norm(block.norm)
        self._qkv = _channels_last(block.to_qkv.weight.detach()[:, :, None]), block.to_qkv.bias.detach()
        self._proj = _channels_last(block.proj.weight.detach()[:, :, None]), block.proj.bias.detach()

    def __call__(self, x: Tensor, cache: _Cache) -> Tensor:
        num_frames, height, width, channels = x.shape
        normed = torch.empty_like(x)
        self._norm(x, normed, silu=False)
        qkv = _convolve(normed, *self._qkv, [0, 0, 0])
        q, k, v = qkv.view(num_frames, 1, height * width, 3 * channels).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return _convolve(y, *self._proj, [0, 0, 0]).add_(x)


class _UpBlock:
    """Residual blocks, then an upsampling if the block has one: Wan 2.1's, and Wan 2.2's with a shortcut around all."""

    def __init__(self, block: WanUpBlock | WanResidualUpBlock, scratch: _Scratch) -> None:
        if isinstance(block, WanResidualUpBlock):
            resample, shortcut = block.upsampler, block.avg_shortcut
        else:
            resample, shortcut = block.upsamplers[0] if block.upsamplers else None, None
        self._resnets = [_ResidualBlock(resnet, scratch) for resnet in block.resnets]
        self._upsample = None if resample is None else _Upsample(resample, scratch)
        self._shortcut = None if shortcut is None else _Shortcut(shortcut)

    def __call__(self, x: Tensor, cache: _Cache, first_chunk: bool) -> Tensor:
        y = x
        for resnet in self._resnets:
            y = resnet(y, cache)
        if self._upsample is None:
            return y
        y = self._upsample(y, cache, first_chunk)
        return y if self._shortcut is None else self._shortcut.add_to(y, x)


class _Upsample:
    """Twice the frames, if the module says so and not for a shot's first latent; then twice the height and width.

    Convolving an image whose pixels stand twice in each direction with a 3x3 kernel is convolving the
    image itself with a 2x2 kernel for each of the four pixels that one becomes: the kernel's rows and
    columns that meet the same pixel are added. It takes 4/9 of the multiplications.
    """

    def __init__(self, resample: WanResample, scratch: _Scratch) -> None:
        in_time = resample.mode == "upsample3d"
        self._time_conv = _CausalConvolution(resample.time_conv, scratch) if in_time else None
        conv = resample.resample[1]
        kernels = [_halved(_halved(conv.weight.detach().float(), 2, i), 3, j) for i, j in product((0, 1), (0, 1))]
        self._weight = _channels_last(torch.cat(kernels)[:, :, None].to(conv.weight.dtype))
        self._bias = conv.bias.detach().repeat(4)

    def __call__(self, x: Tensor, cache: _Cache, first_chunk: bool) -> Tensor:
        if self._time_conv is not None:
            if first_chunk:
                cache.keep(REPEAT)
            else:
                x = self._time_conv(x, cache).unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)
        num_frames, height, width, _ = x.shape
        y = _convolve(x, self._weight, self._bias, [0, 1, 1]).unflatten(3, (2, 2, -1))
        out = y.new_empty(num_frames, height, 2, width, 2, y.shape[-1])
        for i, j in product((0, 1), (0, 1)):
            out[:, :, i, :, j] = y[:, i : i + height, j : j + width, i, j]
        image: Tensor = out.view(num_frames, 2 * height, 2 * width, -1)
        return image


class _Shortcut:
    """Each value becomes the same value in twice the height, width and, it may be, frames."""

    def __init__(self, dup: DupUp3D) -> None:
        self._times = dup.factor_t
        channels = torch.arange(dup.out_channels * dup.factor) // dup.repeats
        """Input channel of each output channel, time, row and column."""
        self._channels = channels.view(dup.out_channels, dup.factor_t, 2, 2)
        self._same_channels = dup.in_channels == dup.out_channels

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add x [T, H, W, C] to y [T' T, 2 H, 2 W, C'] in place; a first latent has the last of the T' times alone."""
        num_frames, height, width, _ = x.shape
        times = y.shape[0] // num_frames
        cells = y.view(num_frames, times, height, 2, width, 2, -1)
        for t, i, j in product(range(times), (0, 1), (0, 1)):
            channels = self._channels[:, self._times - times + t, i, j]
            cells[:, t, :, i, :, j] += x if self._same_channels else x[..., channels]
        return y


def _halved(kernel: Tensor, dim: int, phase: int) -> Tensor:
    """A kernel of 3 over repeated pixels as one of 2 over the pixels, for the first or second of a pixel's copies."""
    first, middle, last = kernel.unbind(dim)
    return torch.stack([first, middle + last] if phase == 0 else [first + middle, last], dim)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, padding: list[int]) -> Tensor:
    """Convolve x [T, H, W, C] with ones as strides. For one clip torch would take its plain fp32 kernel, not oneDNN."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        y = torch.mkldnn_convolution(_as_ncthw(x), weight, bias, padding, [1, 1, 1], [1, 1, 1], 1)
    else:
        y = F.conv3d(_as_ncthw(x), weight, bias, padding=padding)
    return y[0].permute(1, 2, 3, 0).contiguous()


def _bias(conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    assert conv.bias is not None, "Wan's convolutions have a bias"
    return conv.bias.detach()


def _channels_last(weight: Tensor) -> Tensor:
    """[O, I, t, h, w] with I innermost, in strides that say so for kernels of one pixel too."""
    return weight.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format).permute(0, 4, 1, 2, 3)


def _as_ncthw(x_THWC: Tensor) -> Tensor:
    """A view [1, C, T, H, W]."""
    return x_THWC[None].permute(0, 4, 1, 2, 3)
