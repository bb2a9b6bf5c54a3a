"""The Wan VAE's decoder with its layers dealt out to ranks that stand in a line: each hands on what its layers made.

What a layer keeps of the past stays where the layer is, so nothing but activations travels, one way, and a rank is at
the next latents while those behind it finish these. Every layer computes what it computes in a whole decode.

Shapes as in ``longvid.models.wan_vae_layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.models.wan_vae_layers import Cache, ChannelsLastDecoder, ResidualBlock, State, UpBlock, Upsample, as_ncthw

ENCODING = 10_000
"""What encoding a pixel of the film takes, in multiplications of the decoder: the rank of its last part does that."""


class PartDecoder(ChannelsLastDecoder):
    """One of `count` parts of the decoder's layers, in order: those around the attention, or some of upsampling blocks.

    The parts are the most even ones by the number of multiplications, with what follows the last.
    """

    def __init__(self, vae: AutoencoderKLWan, index: int, count: int) -> None:
        super().__init__(vae)
        layers = list(_layers(self))
        assert 0 <= index < count <= len(layers)
        works = [layer.work for layer in layers]
        volume = _volume(layers)
        works[-1] += volume * (self.conv_out.num_weights + ENCODING * (vae.config.patch_size or 1) ** 2)
        bounds = most_even(works, count)
        start, stop = bounds[index : index + 2]
        before, self._layers = layers[:start], layers[start:stop]
        self.is_first, self.is_last = index == 0, index == count - 1
        self.frames = 2 ** sum(layer.doubles_time for layer in before)
        """Of what comes to this part, frames a latent; of a shot's first latent there is one."""
        self.scale = 2 ** sum(layer.doubles_size for layer in before)
        """The height and width of what comes to it, in those of a latent."""
        entries = [0, *accumulate(layer.num_entries for layer in layers)]
        self.entries = range(entries[start], entries[stop] + self.is_last)
        """Its places in a state."""

    @property
    def channels(self) -> int:
        """Of what comes to this part from the one before."""
        assert not self.is_first
        return self._layers[0].num_inputs

    def __call__(self, latents: Tensor, state: State, first_chunk: bool) -> Tensor:
        """The next latents [1, C, F, h, w], or what became of them before [T, H, W, C], to [T', H', W', C'] or, of the
        last part, [1, C', T', H', W']. Its entries of ``state`` keep what later ones need. A shot's first comes alone.
        """
        cache = Cache(state)
        cache.position = self.entries.start
        x = latents
        for layer in self._layers:
            x = layer.run(x, cache, first_chunk)
        return as_ncthw(self.conv_out(x, cache)) if self.is_last else x


@dataclass(frozen=True)
class _Layer:
    """What stays together. `work` is its multiplications for a cell of a latent."""

    run: Callable[[Tensor, Cache, bool], Tensor]
    num_inputs: int
    """Channels of what comes to it."""
    work: int
    num_entries: int
    """Causal convolutions, each of which has an entry in a state."""
    doubles_time: bool = False
    doubles_size: bool = False


def _layers(decoder: ChannelsLastDecoder) -> Iterator[_Layer]:
    """All but the output convolution: up to the attention and behind it; then layer by layer, or by whole blocks where
    a shortcut goes around them."""
    around = [layer for layer in decoder.mid if isinstance(layer, ResidualBlock)]
    work = decoder.conv_in.num_weights + sum(layer.num_weights for layer in around)
    num_inputs, num_entries = decoder.conv_in.weight.shape[1], 1 + 2 * len(around)
    yield _Layer(lambda x, cache, _: decoder.enter(x, cache), num_inputs, work, num_entries)
    volume = 1
    for block in decoder.up:
        layers = list(_layers_of(block, volume))
        yield from layers
        volume *= _volume(layers)


def _layers_of(block: UpBlock, volume: int) -> Iterator[_Layer]:
    """Those of an upsampling block; `volume` is how many cells one of a latent has become before."""
    layers = [_residual(resnet, volume) for resnet in block.resnets]
    if block.upsample is not None:
        layers.append(_upsampling(block.upsample, volume))
    if block.shortcut is None:
        yield from layers
        return
    work, num_entries = sum(layer.work for layer in layers), sum(layer.num_entries for layer in layers)
    last = layers[-1]
    yield _Layer(block, layers[0].num_inputs, work, num_entries, last.doubles_time, last.doubles_size)


def _residual(resnet: ResidualBlock, volume: int) -> _Layer:
    return _Layer(lambda x, cache, _: resnet(x, cache), resnet.num_inputs, resnet.num_weights * volume, 2)


def _upsampling(upsample: Upsample, volume: int) -> _Layer:
    time_conv = upsample.time_conv
    work = upsample.num_weights * volume
    if time_conv is not None:
        work = time_conv.num_weights * volume + 2 * work
    has_time = time_conv is not None
    return _Layer(upsample, upsample.weight.shape[1], work, int(has_time), has_time, doubles_size=True)


def _volume(layers: list[_Layer]) -> int:
    """Cells that one becomes in them."""
    return 1 << sum(layer.doubles_time + 2 * layer.doubles_size for layer in layers)


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
