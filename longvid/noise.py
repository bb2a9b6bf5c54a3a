"""The noise that a chunk starts from: each latent's own draw, the same on every machine layout and in any order."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from longvid.plan import Chunk


def chunk_noise(chunk: Chunk, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise fp32 [channels, chunk.num_latents, height, width] on the CPU; sizes are those of latents.

    Latent f is draw number `chunk.noise[f]` of the base that `chunk.noise_key` names (DualParal's coordinated
    noise). Every draw has its own generator: equal numbers give equal bits in whichever chunk they stand, and
    any can be drawn alone.
    """
    draws = [_draw((*chunk.noise_key, index), (channels, height, width)) for index in chunk.noise]
    return torch.stack(draws, dim=1)


def _draw(key: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(noise_seed(key))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def noise_seed(key: tuple[int, ...]) -> int:
    """A 63-bit seed, stable for ever (torch's CPU generator takes its low 32 bits)."""
    text = "longvid noise 1:" + ",".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
