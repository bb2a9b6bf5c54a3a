"""The Wan VAE's decoder with its layers dealt out to ranks that stand in a line: each hands on what its layers made.

What a layer keeps of the past stays where the layer is, so nothing but activations travels, one way, and a rank is at
the next latents while those behind it finish these. Every layer computes what it computes in a whole decode.

Shapes as in ``longvid.models.wan_vae_layers``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, combinations, pairwise

from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.models.wan_vae_layers import Cache, ChannelsLastDecoder, ResidualBlock, State, UpBlock, as_ncthw


class PartDecoder(ChannelsLastDecoder):
    """One of `count` parts of the decoder's layers, in order: those around the attention, or some upsampling blocks.

    The parts are the most even ones by the number of multiplications.
    """

    def __init__(self, vae: AutoencoderKLWan, index: int, count: int) -> None:
        super().__init__(vae)
        assert 0 <= index < count <= 1 + len(self.up)
        works = [_enter_work(self), *_up_works(self)]
        bounds = most_even(works, count)
        self._blocks = range(*bounds[index : index + 2])
        entries = [1 + 2 * sum(isinstance(layer, ResidualBlock) for layer in self.mid), *map(_num_entries, self.up)]
        starts = [0, *accumulate(entries)]
        self._first_entry = starts[self._blocks.start]
        self.is_first, self.is_last = index == 0, index == count - 1
        before = range(min(self._blocks.start - 1, len(self.up))) if self._blocks.start else ()
        self.frames = 2 ** sum(_doubles_time(self.up[i]) for i in before)
        """Of what comes to this part, frames a latent; of a shot's first latent there is one."""
        self.scale = 2 ** sum(self.up[i].upsample is not None for i in before)
        """The height and width of what comes to it, in those of a latent."""
        self.entries = range(self._first_entry, starts[self._blocks.stop] + self.is_last)
        """Its places in a state."""

    @property
    def channels(self) -> int:
        """Of what comes to this part from the one before."""
        assert not self.is_first
        return self.up[self._blocks.start - 1].resnets[0].num_inputs

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """The next latent [1, C, 1, h, w], or what became of it before [T, H, W, C], to [T', H', W', C']; of the last
        part [1, C', T', H', W']. Its entries of ``state`` keep what later ones need.
        """
        cache = Cache(state)
        cache.position = self._first_entry
        x = latents
        for block in self._blocks:
            x = self.up[block - 1](x, cache, first_chunk) if block else self.enter(x, cache)
        return as_ncthw(self.conv_out(x, cache)) if self.is_last else x


def most_even(works: list[int], count: int) -> list[int]:
    """Bounds of `count` runs, none empty, the largest of which is as small as can be; of equal ones the last is."""

    def sizes(bounds: tuple[int, ...]) -> tuple[int, int]:
        sums = [sum(works[a:b]) for a, b in pairwise(bounds)]
        return max(sums), sums[-1]

    choices: Iterator[tuple[int, ...]] = (
        (0, *inner, len(works)) for inner in combinations(range(1, len(works)), count - 1)
    )
    best = min(choices, key=sizes)
    return list(best)


def _num_entries(block: UpBlock) -> int:
    """Causal convolutions of an upsampling block."""
    return 2 * len(block.resnets) + _doubles_time(block)


def _doubles_time(block: UpBlock) -> bool:
    return block.upsample is not None and block.upsample.time_conv is not None


def _enter_work(decoder: ChannelsLastDecoder) -> int:
    """Multiplications a pixel of a latent in the layers up to the attention and behind it."""
    residual = sum(layer.num_weights for layer in decoder.mid if isinstance(layer, ResidualBlock))
    return residual + decoder.conv_in.num_weights


def _up_works(decoder: ChannelsLastDecoder) -> list[int]:
    """The same of every upsampling block; what follows the last counts to it."""
    works, frames, area = [], 1, 1
    for block in decoder.up:
        work = sum(layer.num_weights for layer in block.resnets) * frames * area
        if block.upsample is not None:
            if block.upsample.time_conv is not None:
                work += block.upsample.time_conv.num_weights * frames * area
                frames *= 2
            work += block.upsample.num_weights * frames * area
            area *= 4
        works.append(work)
    works[-1] += decoder.conv_out.num_weights * frames * area
    return works
