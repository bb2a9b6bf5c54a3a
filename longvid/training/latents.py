"""Encoded clips of the drawn world: made once, kept in shards, drawn as training windows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from longvid.training import world
from longvid.training.vae import to_pixels

SHARD = 256


@dataclass(frozen=True)
class LatentSet:
    """Normalised latents of clips, float16 [clips, F, C, h, w], and what each latent shows."""

    latents: NDArray[np.float16]
    looks: list[list[world.Look]]
    look_of_latent: NDArray[np.int64]
    """[clips, F]: which of the clip's looks holds at each latent's first frame."""

    def __len__(self) -> int:
        return len(self.looks)


def encode_world(
    vae: AutoencoderKLWan,
    folder: Path,
    *,
    clips: int,
    num_frames: int,
    side: int,
    seed: int,
    on_shard: Callable[[int], None] = lambda _: None,
) -> None:
    """Draw and encode clips into ``folder`` in shards of 256; shards that are there stay."""
    vae = vae.to(torch.bfloat16).eval()
    for path, numbers in missing_shards(folder, f"{num_frames:03d}", clips, SHARD):
        drawn = [world.make_clip(np.random.default_rng((seed, 4, num_frames, i)), num_frames, side) for i in numbers]
        latents = encode_clips(vae, [clip.frames for clip in drawn])
        texts = [json.dumps([[asdict(look) for look in clip.looks], clip.changes]) for clip in drawn]
        save_shard(path, latents=latents, texts=np.array(texts))
        on_shard(numbers.stop)


def missing_shards(folder: Path, name: str, total: int, size: int) -> Iterator[tuple[Path, range]]:
    """The shards of ``total`` clips or films that a folder does not have yet: each one's file, and which are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, total, size):
        path = folder / f"{name}_{first:06d}.npz"
        if not path.exists():
            yield path, range(first, min(first + size, total))


def save_shard(path: Path, **arrays: Any) -> None:
    """Write arrays under their names: the whole shard, or nothing."""
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    os.replace(part, path)


def encode_clips(vae: AutoencoderKLWan, clips: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
    """As `encode_frames`, of any number of clips."""
    return np.concatenate([encode_frames(vae, clips[i : i + 16]) for i in range(0, len(clips), 16)])


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, clips: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
    """Normalised latents [clips, F, C, h, w] of clips uint8 [T, H, W, 3] of one length, by a VAE in bfloat16."""
    pixels = to_pixels(np.stack(clips)).to(torch.bfloat16)
    mean = vae.encode(pixels).latent_dist.mode().float()
    latents = (mean - channels(vae.config.latents_mean)) / channels(vae.config.latents_std)
    encoded: NDArray[np.float16] = latents.transpose(1, 2).numpy().astype(np.float16)
    return encoded


def channels(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1, 1)


def load_latents(folder: Path, num_frames: int) -> LatentSet:
    """All shards of clips of ``num_frames`` frames."""
    latents, looks, owners = [], [], []
    for path in sorted(folder.glob(f"{num_frames:03d}_*[0-9].npz")):
        with np.load(path) as shard:
            latents.append(shard["latents"])
            texts = [json.loads(str(text)) for text in shard["texts"]]
        first_frames = np.array([max(0, 4 * latent - 3) for latent in range(latents[-1].shape[1])])
        for clip_looks, changes in texts:
            looks.append([world.Look(**look) for look in clip_looks])
            owners.append(np.searchsorted(np.array(changes), first_frames, side="right") - 1)
    return LatentSet(np.concatenate(latents), looks, np.stack(owners))


@dataclass(frozen=True)
class WindowBatch:
    """Clean windows, float32 [B, C, F, h, w]; captions; which of them each latent attends, [B, F]."""

    clean: Tensor
    captions: list[str]
    index: Tensor


def draw_windows(
    data: LatentSet,
    rng: np.random.Generator,
    *,
    batch: int,
    num_latents: int,
    first: int,
    max_captions: int,
    dropout: float = 0.1,
) -> WindowBatch:
    """Random windows of ``num_latents`` latents from latent ``first`` on; some without their captions.

    At most ``max_captions`` captions are used, so that compiled code meets one shape: when too many
    windows change their look, the last of them are replaced by the first ones.
    """
    rows = rng.integers(0, len(data), batch)
    owners = data.look_of_latent[rows, first : first + num_latents]
    needed = np.cumsum(1 + (owners[:, 0] != owners[:, -1]))
    rows = np.where(needed <= max_captions, rows, rows[np.arange(batch) % int((needed <= max_captions).sum())])
    clean = torch.from_numpy(data.latents[rows, first : first + num_latents].astype(np.float32)).transpose(1, 2)
    captions: list[str] = []
    place: dict[tuple[int, int], int] = {}
    index = np.zeros((batch, num_latents), np.int64)
    for b, row in enumerate(rows):
        owner = data.look_of_latent[row, first : first + num_latents]
        silent = rng.random() < dropout
        for look in np.unique(owner):
            if (int(row), int(look)) not in place:
                place[int(row), int(look)] = len(captions)
                captions.append("" if silent else world.caption(data.looks[row][look], rng))
            index[b, owner == look] = place[int(row), int(look)]
    return WindowBatch(clean.contiguous(), captions + [""] * (max_captions - len(captions)), torch.from_numpy(index))
