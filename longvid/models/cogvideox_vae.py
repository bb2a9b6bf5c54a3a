"""Streaming decode of the CogVideoX VAE: bit-equal to its whole decode, whatever the pushes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from longvid.models.cogvideox import unpack
from longvid.models.wan_vae import to_uint8

FIRST, GROUP = 3, 2
"""Latents that the stock decoder takes at a time, of an odd number: others give other frames."""


class CogVideoXStreamDecoder:
    """Decodes a shot in the stock decoder's groups: latents wait until their group is whole.

    `together` of the VAE's latents are one of the engine's; the first of a shot's first ones is padding. Of the past
    only the causal convolutions' last inputs are kept.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX, together: int) -> None:
        self.vae = vae.eval()
        self._together = together
        self.reset()

    def reset(self) -> None:
        """Forget the shot."""
        self._cache: dict[str, Any] | None = None
        self._waiting: Tensor | None = None

    @torch.no_grad()
    def push(self, latents: Tensor, is_last: bool = False) -> Tensor:
        """Latents fp32 [T·C, F, h, w] to the frames uint8 [T', H, W, 3] of all groups that are whole.

        A shot has an odd number of the VAE's latents, which the last push completes.
        """
        new = unpack(latents, self._together).transpose(0, 1)
        new = new[:, self._together - 1 :] if self._waiting is None else torch.cat([self._waiting, new], 1)
        frames = []
        while new.shape[1] >= (size := GROUP if self._cache else FIRST) or (is_last and new.shape[1]):
            frames.append(self._decode(new[:, :size]))
            new = new[:, size:]
        self._waiting = new
        side = 2 ** (len(self.vae.config.block_out_channels) - 1)
        empty = torch.empty(0, latents.shape[2] * side, latents.shape[3] * side, 3, dtype=torch.uint8)
        return torch.cat([empty, *frames])

    def _decode(self, group_CFhw: Tensor) -> Tensor:
        weight = self.vae.decoder.conv_in.conv.weight
        z = (1 / self.vae.config.scaling_factor * group_CFhw[None]).to(weight)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        pixels, self._cache = self.vae.decoder(z, conv_cache=self._cache)
        return to_uint8(pixels[0])

    def frames_after(self, num_latents: int) -> int:
        """Frames that so many of the engine's latents have given, before a shot's last ones."""
        ready = num_latents * self._together - (self._together - 1)
        ready -= ready % 2 == 0
        return 1 + (ready - 1) * self.vae.config.temporal_compression_ratio if ready >= FIRST else 0

    def state(self) -> dict[str, Tensor]:
        """Where in the shot it is. The tensors are never written to, so they may be saved while it goes on."""
        waiting = {} if self._waiting is None else {"waiting": self._waiting}
        return waiting | dict(_flat(self._cache or {}, "cache"))

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on, to the last bit, where a decoder of the same VAE was when it gave this state."""
        self.reset()
        device = self.vae.decoder.conv_in.conv.weight.device
        self._waiting = state["waiting"].to(device) if "waiting" in state else None
        for path, value in state.items():
            kind, *inner = path.split("/")
            if kind == "cache":
                self._cache = self._cache or {}
                place = self._cache
                for key in inner[:-1]:
                    place = place.setdefault(key, {})
                place[inner[-1]] = value.to(device)


def _flat(cache: Mapping[str, Any], path: str) -> list[tuple[str, Tensor]]:
    """The tensors of nested mappings, by their paths."""
    found: list[tuple[str, Tensor]] = []
    for name, value in cache.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{path}/{name}")
        elif value is not None:
            found.append((f"{path}/{name}", value))
    return found
