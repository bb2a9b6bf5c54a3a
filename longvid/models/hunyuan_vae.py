"""Streaming decode of the HunyuanVideo VAE, as its own framewise decoding does it.

Its convolutions are causal, but its norms are over all frames of what is decoded at once, so no stream can equal the
decode of a whole clip. Nor does stock: it decodes more than 4 latents in tiles of 5, and blends where they overlap.
What comes out is bit-equal to that, ``vae.use_tiling`` (tiles of rows and columns) included.
"""

from __future__ import annotations

from torch import Tensor

from longvid.models.framewise import FramewiseDecoder


class HunyuanStreamDecoder(FramewiseDecoder):
    """Decodes a shot in pushes of any size."""

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.vae
        z = latents[None].to(vae.post_quant_conv.weight) / vae.config.scaling_factor
        ratio = vae.spatial_compression_ratio
        is_large = z.shape[3] > vae.tile_sample_min_height // ratio or z.shape[4] > vae.tile_sample_min_width // ratio
        tiled = vae.use_tiling and is_large
        pixels: Tensor = vae.tiled_decode(z).sample if tiled else vae.decoder(vae.post_quant_conv(z))
        return pixels

    def without_seam(self, tile: Tensor) -> Tensor:
        return tile[:, :, 1:]
