"""Wan from an image: Wan 2.1 and 2.2 I2V, whose condition enters as channels, and 2.2 TI2V, whose first latent it is.

Shapes: z channels of a latent, m of the mask (frames a latent holds), F latents, N image tokens, E width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from longvid.errors import InputError
from longvid.kernels.dense import attend
from longvid.models.checkpoint import FilmInputs
from longvid.models.wan import WanStage
from longvid.models.wan_attention import LayerKv, SceneTextAttention, TextSpan
from longvid.parallel.stage import Unit
from longvid.plan import Chunk

MAX_LATENTS = 4096
"""Latents after which the encoder of a still must have settled: far beyond what its convolutions see."""


@dataclass(frozen=True)
class ImageCondition:
    """An image as a shot's beginning.

    `latents` fp32 [z, F, h, w], normalised: where the condition enters as channels, those of the image followed by
    grey frames without end, of which the last latent stands for all later ones; else the image's one latent, which
    replaces the shot's first. `states` [N, E] of the image encoder, if the model has one.
    """

    latents: Tensor
    replaces_first: bool
    mask_channels: int
    states: Tensor | None = None

    def to(self, device: torch.device) -> ImageCondition:
        states = None if self.states is None else self.states.to(device)
        return replace(self, latents=self.latents.to(device), states=states)

    def show(self, latents: Tensor, chunk: Chunk) -> Tensor:
        """A chunk's finished latents as they are decoded.

        Where the image is the shot's first latent, the film shows it and not what the solver made of it.
        """
        if not self.replaces_first or chunk.start > 0:
            return latents
        return torch.cat([self.latents[:, :1].to(latents), latents[:, 1:]], dim=1)

    def channels(self, positions: range) -> Tensor:
        """Mask and condition [m + z, F, h, w] of the latents at these places in the shot.

        As in stock diffusers the mask is 1 at the shot's first latent and 0 at all others, and the condition of a later
        latent is that of grey frames behind the image.
        """
        places = torch.tensor([min(place, self.latents.shape[1] - 1) for place in positions])
        latents = self.latents[:, places.to(self.latents.device)]
        mask = latents.new_zeros(self.mask_channels, *latents.shape[1:])
        mask[:, [place == 0 for place in positions]] = 1
        return torch.cat([mask, latents])


class WanImageStage(WanStage):
    """Layers of a Wan transformer whose shots begin with an image."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._of_shot: list[tuple[ImageCondition | None, list[LayerKv]]] = []
        self._layer_kv: list[LayerKv] = []
        for index, block in enumerate(self.dit.blocks):
            block.attn2.set_processor(ImageTextAttention(index, self))

    @property
    def image_kv(self) -> list[LayerKv]:
        """K/V of the image of the unit at hand in every layer; none where the model attends no image."""
        return self._layer_kv

    @torch.no_grad()
    def prepare(self, inputs: FilmInputs) -> None:
        """Prompts as ever, and the image of every shot; image K/V are computed once a layer."""
        super().prepare(inputs)
        known: dict[int, list[LayerKv]] = {}
        self._of_shot = [(image, self._kv(image, known)) for image in inputs.images]

    def _kv(self, image: ImageCondition | None, known: dict[int, list[LayerKv]]) -> list[LayerKv]:
        if image is None or image.states is None:
            return []
        if id(image) not in known:
            states = self.dit.condition_embedder.image_embedder(image.states[None].to(self.dtype))
            known[id(image)] = [_image_kv(block.attn2, states) for block in self.dit.blocks]
        return known[id(image)]

    def conditioned(self, unit: Unit) -> Unit:
        """The unit with the image of its shot."""
        image, self._layer_kv = self._of_shot[unit.chunk.shot] if self._of_shot else (None, [])
        return unit if image is None else _conditioned(unit, image)


def _conditioned(unit: Unit, image: ImageCondition) -> Unit:
    """The unit with its image: in its latents on the first stage; and a clean first latent has timestep 0 on all."""
    stop = unit.chunk.start + unit.chunk.num_latents
    positions = range(stop - len(unit.timesteps), stop)
    latents, timesteps = unit.latents, unit.timesteps
    if not image.replaces_first:
        if latents is not None:
            latents = torch.cat([latents, image.channels(positions).to(latents)])
    elif positions.start == 0:
        timesteps = timesteps.clone()
        timesteps[0] = 0.0
        if latents is not None:
            latents = torch.cat([image.latents[:, :1].to(latents), latents[:, 1:]], dim=1)
    return replace(unit, latents=latents, timesteps=timesteps)


class ImageTextAttention(SceneTextAttention):
    """Cross-attention to the scene's prompt, and beside it to the image of the shot (Wan 2.1 I2V)."""

    def __init__(self, index: int, stage: WanImageStage) -> None:
        super().__init__(index)
        self._stage = stage

    def attend_span(self, query: Tensor, span: TextSpan) -> Tensor:
        out = super().attend_span(query, span)
        if self._stage.image_kv:
            out = out + attend(query, *self._stage.image_kv[self.index])
        return out


def _image_kv(attn: Any, states_1NE: Tensor) -> LayerKv:
    shape = (1, states_1NE.shape[1], attn.heads, -1)
    return attn.norm_added_k(attn.add_k_proj(states_1NE)).view(shape), attn.add_v_proj(states_1NE).view(shape)


class WanImageEncoder:
    """An image file to a condition, by the VAE and, in Wan 2.1, a CLIP image encoder."""

    def __init__(
        self, vae: AutoencoderKLWan, processor: Any = None, encoder: Any = None, *, first_alone: bool = False
    ) -> None:
        self._vae, self._processor, self._encoder = vae, processor, encoder
        self._first_alone = first_alone
        self._pixels = VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)

    @torch.no_grad()
    def encode(self, path: Path, width: int, height: int) -> ImageCondition:
        """The condition of an image, stretched to the film's size as stock diffusers does. Raises InputError."""
        image = open_image(path)
        states = None
        if self._encoder is not None:
            inputs = self._processor(images=image, return_tensors="pt").to(self._encoder.device)
            pixels = inputs.pixel_values.to(self._encoder.dtype)
            states = self._encoder(pixels, output_hidden_states=True).hidden_states[-2][0]
        frame = self._pixels.preprocess(image, height=height, width=width)
        return ImageCondition(
            latents=self._latents(frame[:, :, None]),
            replaces_first=self._first_alone,
            mask_channels=self._vae.config.scale_factor_temporal,
            states=states,
        )

    def _latents(self, frame_1CTHW: Tensor) -> Tensor:
        """Normalised latents of a frame; and of the grey ones after it, until they no longer change."""
        weight = self._vae.quant_conv.weight
        stream = _StreamEncoder(self._vae)
        latents = [stream.push(frame_1CTHW.to(weight))]
        if not self._first_alone:
            count = self._vae.config.scale_factor_temporal
            grey = torch.zeros_like(frame_1CTHW).expand(-1, -1, count, -1, -1).to(weight)
            while len(latents) < MAX_LATENTS:
                latents.append(stream.push(grey))
                if stream.is_settled:
                    break
        config, shape = self._vae.config, (-1, 1, 1, 1)
        mean, std = (torch.tensor(x).view(shape) for x in (config.latents_mean, config.latents_std))
        normalised: Tensor = (torch.cat(latents, dim=1).float().cpu() - mean) * (1.0 / std)
        return normalised


class _StreamEncoder:
    """The VAE's encoder, a latent at a time, as its own encode does: the first holds one frame."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._state: list[Any] = [None] * vae._cached_conv_counts["encoder"]
        self.is_settled = False
        """Whether the last push changed nothing that later ones see: equal frames then give equal latents."""

    def push(self, frames_1CTHW: Tensor) -> Tensor:
        """Latents [z, 1, h, w] of the next frames, the distribution's mode."""
        before = list(self._state)
        patched = _patchify(frames_1CTHW, self._vae.config.patch_size or 1)
        moments = self._vae.quant_conv(self._vae.encoder(patched, feat_cache=self._state, feat_idx=[0]))
        self.is_settled = all(_equal(old, new) for old, new in zip(before, self._state, strict=True))
        mode: Tensor = moments.chunk(2, dim=1)[0][0]
        return mode


def _equal(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return torch.equal(old, new)
    return old is new


def _patchify(x_1CTHW: Tensor, patch: int) -> Tensor:
    """Pixels to channels; a pixel's column comes before its row, as Wan has it."""
    if patch == 1:
        return x_1CTHW
    cells: Tensor = x_1CTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # [1, C, T, H, p, W, q]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def open_image(path: Path) -> Image.Image:
    """An image file in RGB. Raises InputError."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: is not an image that can be read ({error})") from None
