"""Streaming decode of the Wan VAE: the latents of a push, with the causal state kept across pushes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.models.wan_vae_bands import BandedDecoder
from longvid.models.wan_vae_layers import REPEAT, ChannelsLastDecoder, State, as_ncthw
from longvid.models.wan_vae_shared import SharedDecoder, rows_of
from longvid.parallel.comm import Group

_NO_FRAMES = torch.empty(0, 0, 0, 3, dtype=torch.uint8)


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
        self._shared: SharedDecoder | None = None
        config = vae.config
        shape = (1, config.z_dim, 1, 1, 1)
        self._mean = torch.tensor(config.latents_mean).view(shape)
        self._std = torch.tensor(config.latents_std).view(shape)
        self.reset()

    def split_rows(self, rows: int) -> None:
        """Decode so many rows of latents at a time from here on, for memory; it forgets the shot."""
        self._decoder = BandedDecoder(self.vae, rows)
        self.reset()

    def share_rows(self, group: Group) -> None:
        """Decode together with the other members of a group from here on, each its rows; it forgets the shot.

        All members call `reset`, `push`, `load_state` and `whole_state` together. The first one has the latents, and
        gets the frames; the latents of the others say the shape alone, and they get the frames of their rows.
        """
        self._shared = SharedDecoder(self.vae, group)
        self._decoder = self._shared
        self.reset()

    def reset(self) -> None:
        """Forget the shot: the next latent pushed is a first latent, which holds one frame."""
        self._state: State = [None] * self.vae._cached_conv_counts["decoder"]
        self._is_first = True

    @torch.no_grad()
    def push(self, latents: Tensor, is_last: bool = False) -> Tensor:
        """Decode normalised latents fp32 [C, F, h, w] to frames uint8 [T, H, W, 3] on the CPU.

        A shot's first latent gives 1 frame, each later one as many as the temporal ratio (4).
        """
        if self._shared is None:
            return self._decode(latents)
        bands = self._shared.share(latents.shape[2])
        own = bands.deal(latents.to(self._device), dim=2)
        if not bands.own:
            self._is_first = False
            return _NO_FRAMES
        return bands.collect(self._decode(own), dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        weight, device = self.vae.post_quant_conv.weight, self._device
        latents = latents[None].to(device) * self._std.to(device) + self._mean.to(device)
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
        """Where in the shot it is. The tensors are never written to, so they may be saved while it goes on.

        Of a decoder that shares rows it is the part of these: `join_states` makes a whole one of all parts.
        """
        state = {"is_first": torch.tensor(self._is_first)}
        if self._shared and not self._is_first:
            own = self._shared.bands.own
            state["rows"] = torch.tensor([own.start, own.stop, self._shared.bands.height])
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
        """Go on, to the last bit, where a decoder of the same VAE was when it gave this state.

        One that shares rows takes a whole state, too, or a part that has its rows.
        """
        self.reset()
        self._is_first = bool(state["is_first"])
        if self._shared and not self._is_first:
            state = _own_rows(state, self._shared)
        device = self._device
        for i in range(len(self._state)):
            if f"{REPEAT}_{i}" in state:
                self._state[i] = REPEAT
            elif f"conv_{i}" in state:
                self._state[i] = state[f"conv_{i}"].to(device)
            elif f"conv_{i}_0" in state:
                bands = takewhile(state.__contains__, (f"conv_{i}_{band}" for band in count()))
                self._state[i] = [state[name].to(device) for name in bands]

    def whole_state(self) -> dict[str, Tensor]:
        """The state of a whole decode, on the first member of the group that shares rows; nothing on the others."""
        state, shared = self.state(), self._shared
        if shared is None or self._is_first:
            return state
        rows = state.pop("rows")
        whole = {
            name: as_ncthw(shared.bands.collect(_as_thwc(value), dim=1)) if name.startswith("conv") else value
            for name, value in state.items()
        }
        return {} if rows[0] else whole

    @property
    def _device(self) -> torch.device:
        return self.vae.post_quant_conv.weight.device


def join_states(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state of a whole decode, of the parts of it that the members of a group have; or of one that is whole."""
    with_rows = [part for part in parts if "rows" not in part or part["rows"][0] < part["rows"][1]]
    with_rows.sort(key=lambda part: int(part["rows"][0]) if "rows" in part else 0)
    first = {name: value for name, value in with_rows[0].items() if name != "rows"}
    for name in first:
        if name.startswith("conv"):
            first[name] = as_ncthw(torch.cat([_as_thwc(part[name]) for part in with_rows], dim=1))
    return first


def _own_rows(state: Mapping[str, Tensor], shared: SharedDecoder) -> dict[str, Tensor]:
    """What this member needs of a whole state, or of a part that has its rows."""
    whole = state["conv_0"].shape[3] if "rows" not in state else 0
    start, stop, height = state["rows"].tolist() if "rows" in state else (0, whole, whole)
    own = shared.share(height).own
    return {
        name: rows_of(value, range(start, stop), own) if name.startswith("conv") else value
        for name, value in state.items()
        if own or not name.startswith("conv")
    }


def _as_thwc(entry: Tensor) -> Tensor:
    return entry[0].permute(1, 2, 3, 0)


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
    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need."""
        ...


class _StockDecoder:
    """diffusers' decoder, one latent a pass as its own decode does."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need."""
        x = self._vae.post_quant_conv(latents)
        frames: Tensor = self._vae.decoder(x, feat_cache=state, feat_idx=[0], first_chunk=first_chunk)
        return frames
