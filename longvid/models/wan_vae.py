"""Streaming decode of the Wan VAE: the latents of a push, with the causal state kept across pushes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.kernels.pixels import to_bytes
from longvid.models.wan_vae_bands import BandedDecoder
from longvid.models.wan_vae_layers import REPEAT, ChannelsLastDecoder, State
from longvid.models.wan_vae_line import PartDecoder
from longvid.models.wan_vae_shared import SharedDecoder, rows_of
from longvid.parallel.collectives import Group

_NO_FRAMES = torch.empty(0, 0, 0, 3, dtype=torch.uint8)


class WanStreamDecoder:
    """Decodes a shot in pushes of any size; the frames are bit-equal to one whole decode, wherever it is cut.

    Memory does not grow: of the past only the causal convolutions' last two inputs are kept. Latents are decoded one at
    a time, for oneDNN chooses its kernels, and so its rounding, by size; with matrix units small ones go together. On a
    CPU the layers are our own (``ChannelsLastDecoder``), within fp32 rounding of diffusers'.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae.eval()
        on_cpu = vae.post_quant_conv.weight.device.type == "cpu"
        self._decoder: _Decoder = ChannelsLastDecoder(vae) if on_cpu else _StockDecoder(vae)
        self._shared: SharedDecoder | None = None
        self._part: PartDecoder | None = None
        self._is_first = True
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

        All members call `reset` and `push` together. The first one has the latents, and
        gets the frames; the latents of the others say the shape alone, and they get the frames of their rows.
        """
        self._shared = SharedDecoder(self.vae, group)
        self._decoder = self._shared
        self.reset()

    def take_part(self, index: int, count: int) -> None:
        """Have some of the layers alone from here on, one of so many parts; `hand_on` takes the place of `push`."""
        self._decoder = self._part = PartDecoder(self.vae, index, count)
        self.reset()

    @torch.no_grad()
    def hand_on(self, x: Tensor) -> Tensor:
        """What this part makes of latents fp32 [C, F, h, w], if it is the first, or of what the part before made of
        them [T, H, W, C]. The last part's are frames uint8 on the CPU, as of `push`.
        """
        part = self._part
        assert part is not None
        made = []
        for some in self._latents_together(x, part):
            y = part(some, self._state, self._is_first)
            made.append(self._frames(y) if part.is_last else y)
            self._is_first = False
        return torch.cat(made)

    def handed_shape(self, num_latents: int, height: int, width: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Of what comes to a part that is not the first, of latents that do not begin a shot."""
        part = self._part
        assert part is not None
        weight = self.vae.post_quant_conv.weight
        shape = (num_latents * part.frames, height * part.scale, width * part.scale, part.channels)
        return shape, weight.dtype

    def _latents_together(self, x: Tensor, part: PartDecoder) -> Iterator[Tensor]:
        """Latents, or what was made of them, as many at once as `push` takes."""
        if part.is_first:
            count, height, width = x.shape[1:]
            yield from self._normalised(x).split(self._group_sizes(count, height * width), dim=2)
            return
        count = self._is_first + (len(x) - self._is_first) // part.frames
        sizes = self._group_sizes(count, x.shape[1] * x.shape[2] // part.scale**2)
        of_first = [1] if self._is_first else []
        yield from x.split([*of_first, *(size * part.frames for size in sizes[len(of_first) :])])

    def _group_sizes(self, count: int, cells: int) -> list[int]:
        """Into how many latents of so many cells each the next ones are divided; a shot's first comes alone."""
        first, at_once = int(self._is_first), self._decoder.at_once(cells)
        rest = count - first
        return [*[1] * first, *[at_once] * (rest // at_once), *[rest % at_once] * (rest % at_once > 0)]

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
        if self._shared is None:
            return self._decode(latents)
        bands = self._shared.share(latents.shape[2])
        own = bands.deal(latents.to(self._device), dim=2)
        if not bands.own:
            self._is_first = False
            return _NO_FRAMES
        return bands.collect(self._decode(own), dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        frames, (count, height, width) = [], latents.shape[1:]
        for part in self._normalised(latents).split(self._group_sizes(count, height * width), dim=2):
            frames.append(self._frames(self._decoder(part, self._state, self._is_first)))
            self._is_first = False
        return torch.cat(frames)

    def _normalised(self, latents: Tensor) -> Tensor:
        """As the decoder takes them: [1, C, F, h, w]."""
        weight, device = self.vae.post_quant_conv.weight, self._device
        latents = latents[None].to(device) * self._std.to(device) + self._mean.to(device)
        return latents.to(weight.dtype)

    def _frames(self, x: Tensor) -> Tensor:
        return to_bytes(x[0].permute(1, 2, 3, 0), self.vae.config.patch_size or 1)

    def frames_after(self, num_latents: int) -> int:
        """Frames that so many latents of a shot have given."""
        return 1 + (num_latents - 1) * self.vae.config.scale_factor_temporal if num_latents else 0

    def state(self) -> dict[str, Tensor]:
        """Where in the shot it is. The tensors are never written to, so they may be saved while it goes on.

        Of one that shares rows, or has some layers alone, it is a part: `join_states` makes a whole one of all.
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
        for i in self._part.entries if self._part else range(len(self._state)):
            if f"{REPEAT}_{i}" in state:
                self._state[i] = REPEAT
            elif f"conv_{i}" in state:
                self._state[i] = state[f"conv_{i}"].to(device)
            elif f"conv_{i}_0" in state:
                bands = takewhile(state.__contains__, (f"conv_{i}_{band}" for band in count()))
                self._state[i] = [state[name].to(device) for name in bands]

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.vae.post_quant_conv.weight.device
        return device


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


def to_uint8(x_CTHW: Tensor) -> Tensor:
    """[-1, 1] floats [3, T, H, W] to rounded uint8 [T, H, W, 3] on the CPU."""
    return to_bytes(x_CTHW.permute(1, 2, 3, 0))


class _Decoder(Protocol):
    def release(self) -> None:
        """Give back memory that is kept from pass to pass."""
        ...

    def at_once(self, cells: int) -> int:
        """How many latents of so many cells it should be given in a pass."""
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

    def at_once(self, cells: int) -> int:
        """One, as its own decode has it."""
        return 1

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """Decode the next latents [1, C, F, h, w] to [1, C, T, H, W] and keep in ``state`` what later ones need."""
        x = self._vae.post_quant_conv(latents)
        frames: Tensor = self._vae.decoder(x, feat_cache=state, feat_idx=[0], first_chunk=first_chunk)
        return frames
