"""Streaming decode of the Wan VAE: the latents of a push, with the causal state kept across pushes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.models.wan_vae_bands import BandedDecoder
from longvid.models.wan_vae_layers import REPEAT, ChannelsLastDecoder, State


class WanStreamDecoder:
    """Decodes a shot in pushes of any size; the frames are bit-equal to one whole decode, wherever it is cut.

    Memory does not grow: of the past only the causal convolutions' last two inputs are kept. Latents are decoded one at
    a time, for oneDNN chooses its kernels, and so its rounding, by size. On a CPU the layers are our own
    (``ChannelsLastDecoder``), within fp32 rounding of diffusers'.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval()
        on_cpu = vae.post_quant_conv.weight.device.type == "cpu"
        self._decoder: _Decoder = ChannelsLastDecoder(vae) if on_cpu else _StockDecoder(vae)
        config = vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).view(shape)
        self._std = torch.tensor(config.latents_std).view(shape)
        self.reset()

    def split_rows(self, rows: int) -> None:
        """Decode so many rows of latents at a time from here on, for memory; it forgets the shot."""
        self._decoder = BandedDecoder(self.vae, rows)
        self.reset()

    def reset(self) -> None:
        """Forget the shot: the next latent pushed is a first latent, which holds one frame."""
        self._state: State = [None] * self.vae._cached_conv_counts["decoder"]
        self._is_first = True
        self._decoder.release()

    @torch.no_grad()
    def push(self, latents: Tensor, is_last: bool = False) -> Tensor:
        """Decode normalised latents fp32 [C, F, h, w] to frames uint8 [T, H, W, 3] on the CPU.

        A shot's first latent gives 1 frame, each later one as many as the temporal ratio (4).
        """
        weight = self.vae.post_quant_conv.weight
        latents = latents[None].to(weight.device) * self._std.to(weight.device) + self._mean.to(weight.device)
        frames = []
        for i in range(latents.shape[2]):
            x = self._decoder(latents[:, :, i : i + 1].to(weight.dtype), self._state, self._is_first)
            frames.append(_unpatchify(to_uint8(x[0]), self.vae.config.patch_size or 1))
            self._is_first = False
        return torch.cat(frames)

    def frames_after(self, num_latents: int) -> int:
        """Frames that so many latents of a shot have given."""
        return 1 + (num_latents - 1) * self.vae.config.scale_factor_temporal if num_latents else 0

    def state(self) -> dict[str, Tensor]:
        """Where in the shot it is. The tensors are never written to, so they may be saved while it goes on."""
        state = {"is_first": torch.tensor(self._is_first)}
        for i, inputs in enumerate(self._state):
            if isinstance(inputs, Tensor):
                state[f"conv_{i}"] = inputs
            elif isinstance(inputs, list):
                state |= {f"conv_{i}_{band}": rows for band, rows in enumerate(inputs)}
            elif inputs is not None:
                assert inputs == REPEAT
                state[f"{REPEAT}_{i}"] = torch.empty(0)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on, to the last bit, where a decoder of the same VAE was when it gave this state."""
        self.reset()
        self._is_first = bool(state["is_first"])
        device = self.vae.post_quant_conv.weight.device
        for i in range(len(self._state)):
            if f"{REPEAT}_{i}" in state:
                self._state[i] = REPEAT
            elif f"conv_{i}" in state:
                self._state[i] = state[f"conv_{i}"].to(device)
            elif f"conv_{i}_0" in state:
                bands = takewhile(state.__contains__, (f"conv_{i}_{band}" for band in count()))
                self._state[i] = [state[name].to(device) for name in bands]


def to_uint8(x_CTHW: Tensor) -> Tensor:
    """[-1, 1] floats [3, T, H, W] to rounded uint8 [T, H, W, 3] on the CPU."""
    scaled = x_CTHW.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(1, 2, 3, 0).cpu()


def _unpatchify(x_THWC: Tensor, patch: int) -> Tensor:
    """[T, H, W, 3 patch patch] to [T, H patch, W patch, 3]; a pixel's column comes before its row, as Wan has it."""
    num_frames, height, width, channels = x_THWC.shape
    cells = x_THWC.view(num_frames, height, width, -1, patch, patch).permute(0, 1, 5, 2, 4, 3)
    return cells.reshape(num_frames, height * patch, width * patch, channels // patch**2)


class _Decoder(Protocol):
    def release(self) -> None:
        """Give back memory that is kept from pass to pass."""
        ...

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need."""
        ...


class _StockDecoder:
    """diffusers' decoder, one latent a pass as its own decode does."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae

    def release(self) -> None:
        """Nothing is kept."""

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need."""
        x = self._vae.post_quant_conv(latents)
        frames: Tensor = self._vae.decoder(x, feat_cache=state, feat_idx=[0], first_chunk=first_chunk)
        return frames
