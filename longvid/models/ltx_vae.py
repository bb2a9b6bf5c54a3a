"""Streaming decode of the LTX VAE, as its own framewise decoding does it.

The decoder is not causal and sees 20 latents to either side, so no stream can equal the decode of a whole clip. What
comes out is bit-equal to the stock VAE's decode with ``use_framewise_decoding``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvid.models.framewise import FramewiseDecoder


class LtxStreamDecoder(FramewiseDecoder):
    """Decodes a shot in pushes of any size."""

    def decode(self, latents: Tensor) -> Tensor:
        """[1, 3, T, H, W] of a tile; a decoder that takes a timestep is given 0, as the stock pipeline does."""
        vae, shape = self.vae, (1, -1, 1, 1, 1)
        weight = vae.decoder.conv_in.conv.weight
        mean, std = vae.latents_mean.view(shape), vae.latents_std.view(shape)
        z = latents[None].to(mean) * std / vae.config.scaling_factor + mean
        temb = torch.zeros(1, dtype=weight.dtype, device=weight.device) if vae.config.timestep_conditioning else None
        pixels: Tensor = vae.decoder(z.to(weight), temb)
        return pixels

    def without_seam(self, tile: Tensor) -> Tensor:
        return tile[:, :, :-1]
