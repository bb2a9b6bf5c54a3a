"""Decoders decode when `ModelFacts.decoder_passes` says, and as much as that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longvid.geometry import EACH_ALONE, DecoderPasses
from longvid.models.cogvideox_vae import CogVideoXStreamDecoder
from longvid.models.facts import facts_of
from longvid.models.framewise import FramewiseDecoder


class Tiles(FramewiseDecoder):
    """What a family's tiles have, without its layers: a frame of a tile says nothing."""

    def __init__(self, size: int, stride: int, ratio: int) -> None:
        names = {"temporal_compression_ratio": ratio, "spatial_compression_ratio": 1}
        tiles = {"tile_sample_min_num_frames": size, "tile_sample_stride_num_frames": stride}
        module = torch.nn.Identity()
        for name, value in {**names, **tiles}.items():
            setattr(module, name, value)
        module.blend_t = lambda before, tile, overlap: tile
        self.taken: list[int] = []
        super().__init__(module)

    def decode(self, latents: Tensor) -> Tensor:
        self.taken.append(latents.shape[1])
        return torch.zeros(1, 3, 1 + (latents.shape[1] - 1) * self.vae.temporal_compression_ratio, *latents.shape[2:])

    def without_seam(self, tile: Tensor) -> Tensor:
        return tile[:, :, 1:]


class Groups(CogVideoXStreamDecoder):
    """CogVideoX's groups without its layers."""

    def __init__(self, together: int) -> None:
        vae: Any = torch.nn.Identity()
        vae.config = SimpleNamespace(block_out_channels=[1], temporal_compression_ratio=4)
        self.taken: list[int] = []
        super().__init__(vae, together)

    def _decode(self, group_CFhw: Tensor) -> Tensor:
        self.taken.append(group_CFhw.shape[1])
        self._cache = {"": None}
        return torch.zeros(group_CFhw.shape[1], *group_CFhw.shape[2:], 3, dtype=torch.uint8)


def latents_taken(decoder: Any, count: int, channels: int) -> list[int]:
    """Pushed one by one: how many went through the decoder as each came."""
    found = []
    for latent in range(count):
        decoder.taken.clear()
        decoder.push(torch.zeros(channels, 1, 2, 2), latent + 1 == count)
        found.append(sum(decoder.taken))
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 13, 24])
def test_tiles_are_decoded_when_the_facts_say_so(count: int) -> None:
    for model, tiles in (("HunyuanVideo", (16, 12, 4)), ("LTX-Video", (16, 8, 8))):
        passes = facts_of(model).decoder_passes
        assert latents_taken(Tiles(*tiles), count, 4) == list(passes.works(range(count), count)), model


@pytest.mark.parametrize("count", [1, 3, 5, 13, 25])
def test_groups_are_decoded_when_the_facts_say_so(count: int) -> None:
    passes = facts_of("CogVideoX-5b").decoder_passes
    assert latents_taken(Groups(1), count, 4) == list(passes.works(range(count), count))
    taken = latents_taken(Groups(2), count, 8)  # of the VAE's: two are one of the engine's, but for a shot's first
    work = passes_of_pairs = facts_of("CogVideoX1.5-5B").decoder_passes.works(range(count), count)
    assert [bool(some) for some in taken] == [bool(some) for some in passes_of_pairs]
    assert sum(taken) == 2 * sum(work) - 1


def test_a_streaming_decoder_takes_each_latent_as_it_comes() -> None:
    assert facts_of("Wan2.1-T2V-1.3B").decoder_passes == EACH_ALONE
    assert EACH_ALONE.works(range(3, 9), 9) == (1,) * 6


def test_in_the_long_run_a_latent_is_decoded_as_often_as_is_said() -> None:
    passes = DecoderPasses(first=5, step=3, window=5)
    assert sum(passes.works(range(300), 1000)) == pytest.approx(300 * passes.repeated, rel=0.02)
