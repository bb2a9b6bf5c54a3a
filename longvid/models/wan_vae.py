"""Streaming decode of the Wan VAE: one latent at a time, with the causal state kept across chunks."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor


class WanStreamDecoder:
    """Decodes a shot in pushes of any size; the frames are bit-equal to one whole decode.

    The state is the last two inputs of each causal convolution, so memory does not grow.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval()
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
