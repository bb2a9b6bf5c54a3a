"""Streaming decode of the Wan VAE: one latent at a time, with the causal state kept across chunks."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor, nn
from torch.nn import functional as F


class WanStreamDecoder:
    """Decodes a shot in pushes of any size; the frames are bit-equal to one whole decode.

    The state is the last two inputs of each causal convolution, so memory does not grow. On a CPU
    the decoder's convolutions are replaced in place by ``OneDnnCausalConv3d``.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval()
        use_onednn(vae.decoder)
        config = vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).view(shape)
        self._std = torch.tensor(config.latents_std).view(shape)
        self.reset()

    def reset(self) -> None:
        """Forget the shot: the next latent pushed is a first latent, which holds one frame."""
        self._state: list[Tensor | str | None] = [None] * self.vae._cached_conv_counts["decoder"]
        self._is_first = True

    @torch.no_grad()
    def push(self, latents: Tensor) -> Tensor:
        """Decode normalised latents fp32 [C, F, h, w] to frames uint8 [T, H, W, 3] on the CPU.

        A shot's first latent gives 1 frame, each later one as many as the temporal ratio (4).
        """
        weight = self.vae.post_quant_conv.weight
        latents = latents[None].to(weight.device) * self._std.to(weight.device) + self._mean.to(weight.device)
        frames = []
        for i in range(latents.shape[2]):
            x = self.vae.post_quant_conv(latents[:, :, i : i + 1].to(weight.dtype))
            x = self.vae.decoder(x, feat_cache=self._state, feat_idx=[0], first_chunk=self._is_first)
            self._is_first = False
            if self.vae.config.patch_size is not None:
                x = unpatchify(x, patch_size=self.vae.config.patch_size)
            frames.append(to_uint8(x[0]))
        return torch.cat(frames)


def to_uint8(x_CTHW: Tensor) -> Tensor:
    """[-1, 1] floats [3, T, H, W] to rounded uint8 [T, H, W, 3] on the CPU."""
    scaled = x_CTHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu()


class OneDnnCausalConv3d(nn.Module):
    """A causal convolution that always runs in oneDNN.

    For one clip at a time torch takes its plain fp32 kernel, which is 3 times as slow; the results
    differ by rounding.
    """

    def __init__(self, conv: WanCausalConv3d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._padding, self._stride = conv._padding, list(conv.stride)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = list(self._padding)
        if cache_x is not None and padding[4] > 0:
            x = torch.cat([cache_x, x], dim=2)
            padding[4] -= cache_x.shape[2]
        x = F.pad(x, padding)
        out: Tensor = torch.mkldnn_convolution(x, self.weight, self.bias, [0, 0, 0], self._stride, [1, 1, 1], 1)
        return out


def use_onednn(module: nn.Module) -> None:
    """Replace the causal convolutions inside ``module`` where that is faster: fp32 on a CPU."""
    if not torch.backends.mkldnn.is_available():
        return
    for name, child in module.named_children():
        if isinstance(child, WanCausalConv3d):
            if child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                setattr(module, name, OneDnnCausalConv3d(child))
        else:
            use_onednn(child)
