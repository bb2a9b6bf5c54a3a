"""Streaming decode by tiles of latents that are blended where they overlap, as stock VAEs decode framewise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longvid.models.wan_vae import to_uint8


class FramewiseDecoder(ABC):
    """Decodes a shot in pushes of any size: a tile as soon as its latents are there.

    The stock decoder's tiles begin every `tile_sample_stride_num_frames`, and have one latent more than
    `tile_sample_min_num_frames` hold; a shot of no more than those is decoded whole.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval()
        ratio = vae.temporal_compression_ratio
        self._size, self._stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
        self._stride_frames = vae.tile_sample_stride_num_frames
        self._overlap = vae.tile_sample_min_num_frames - vae.tile_sample_stride_num_frames
        self.reset()

    def reset(self) -> None:
        """Forget the shot."""
        self._waiting: Tensor | None = None
        self._previous: Tensor | None = None

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[1, 3, T, H, W] of a tile of latents fp32 [C, F, h, w]."""

    @abstractmethod
    def without_seam(self, tile: Tensor) -> Tensor:
        """A tile behind the first, without the frame that it has too many."""

    @torch.no_grad()
    def push(self, latents: Tensor, is_last: bool = False) -> Tensor:
        """Latents fp32 [C, F, h, w] to the frames uint8 [T, H, W, 3] of all tiles that are whole."""
        waiting = latents if self._waiting is None else torch.cat([self._waiting, latents], 1)
        frames = [self._empty(latents)]
        if is_last and self._previous is None and waiting.shape[1] <= self._size:
            frames.append(to_uint8(self.decode(waiting)[0]))
        else:
            while waiting.shape[1] > self._size or (is_last and waiting.shape[1] > 1):
                frames.append(self._next_tile(waiting[:, : self._size + 1]))
                waiting = waiting[:, self._stride :]
        self._waiting = waiting
        return torch.cat(frames)

    def _empty(self, latents: Tensor) -> Tensor:
        ratio = self.vae.spatial_compression_ratio
        return torch.empty(0, latents.shape[2] * ratio, latents.shape[3] * ratio, 3, dtype=torch.uint8)

    def _next_tile(self, latents: Tensor) -> Tensor:
        """The frames up to the next tile, faded in over the last one's end."""
        tile, is_first = self.decode(latents), self._previous is None
        if self._previous is not None:
            tile = self.vae.blend_t(self._previous, self.without_seam(tile), self._overlap)
        self._previous = tile
        return to_uint8(tile[0, :, : self._stride_frames + is_first])

    def frames_after(self, num_latents: int) -> int:
        """Frames that so many latents of a shot have given, before the last ones."""
        tiles = max(0, -(-(num_latents - self._size) // self._stride))
        return tiles * self._stride_frames + 1 if tiles else 0

    def state(self) -> dict[str, Tensor]:
        """Where in the shot it is. The tensors are never written to, so they may be saved while it goes on."""
        state = {"waiting": self._waiting, "previous": self._previous}
        return {name: value for name, value in state.items() if value is not None}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on, to the last bit, where a decoder of the same VAE was when it gave this state."""
        device = next(self.vae.parameters()).device  # a state may come from another rank, through the host
        self._waiting, self._previous = (
            state[name].to(device) if name in state else None for name in ("waiting", "previous")
        )
