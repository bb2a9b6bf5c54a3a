"""What a model takes and costs, by its configs alone: parameters, and floating-point operations. No torch, no weights.

A multiplication and an addition are two operations (FLOPs), as in torch's FlopCounterMode; norms, activations and
rotary positions are not counted. W is the width of a token, S the tokens of a pass, K those that it attends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from math import sqrt
from typing import Any, Literal, Protocol, Self

from longvid.models.parts import ModelPart

Config = Mapping[str, Any]


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    """Parameters of a linear layer."""
    return inputs * outputs + bias * outputs


def two_linears(inputs: int, outputs: int) -> int:
    """Parameters of an embedder: two linear layers, the second square."""
    return linear(inputs, outputs) + linear(outputs, outputs)


@dataclass(frozen=True)
class Tokens:
    """A pass: `own` tokens go through the layers, and attend `seen` ones, `text` columns and an `image`'s."""

    own: int
    seen: int
    text: int
    image: int = 0


@dataclass(frozen=True)
class Flops:
    """Operations by kind.

    `attention` is that among tokens (with text, where it is joint), `text` what is spent on cross-attention, `prompt`
    on K/V of a prompt alone, which need not be computed anew at every step. `levels` is what depends on the noise level
    alone.
    """

    attention: float = 0.0
    projections: float = 0.0
    feed_forward: float = 0.0
    text: float = 0.0
    prompt: float = 0.0
    levels: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(value * factor for value in astuple(self)))

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @property
    def each_step(self) -> float:
        """Without what is computed once a prompt."""
        return self.total - self.prompt


EightBits = Literal["none", "int8", "fp8", "w8a8"]
"""How linear layers are held, as `memory.quantize` says it."""


class Layer(Protocol):
    """A transformer layer."""

    @property
    def params(self) -> int: ...

    @property
    def linear_params(self) -> int:
        """Weights that `memory.quantize` puts in 8 bits."""
        ...

    @property
    def projection_params(self) -> int:
        """Those, and what projects the prompt."""
        ...

    @property
    def eight_bits(self) -> EightBits: ...

    def linear_flops(self, tokens: Tokens) -> float:
        """Operations of those weights."""
        ...

    def held(self, eight_bits: EightBits) -> Self:
        """The same layer with its linear weights held so."""
        ...

    @property
    def width(self) -> int: ...

    @property
    def inner(self) -> int:
        """Width of the feed-forward."""
        ...

    def flops(self, tokens: Tokens) -> Flops: ...


@dataclass(frozen=True)
class CrossLayer:
    """Self-attention, then cross-attention to text of `text_width`, then a feed-forward."""

    params: int
    width: int
    inner: int
    text_width: int
    eight_bits: EightBits = "none"

    @property
    def linear_params(self) -> int:
        return 6 * self.width**2 + 2 * self.width * self.inner

    @property
    def projection_params(self) -> int:
        return self.linear_params + 2 * self.text_width * self.width

    def linear_flops(self, tokens: Tokens) -> float:
        return 2 * tokens.own * self.linear_params

    def held(self, eight_bits: EightBits) -> Self:
        return replace(self, eight_bits=eight_bits)

    def flops(self, tokens: Tokens) -> Flops:
        square, columns = self.width**2, tokens.text + tokens.image
        return Flops(
            attention=4 * tokens.own * tokens.seen * self.width,
            projections=8 * tokens.own * square,
            feed_forward=4 * tokens.own * self.width * self.inner,
            text=4 * tokens.own * square + 4 * tokens.own * columns * self.width,
            prompt=4 * columns * self.text_width * self.width,
        )


@dataclass(frozen=True)
class JointLayer:
    """Attention and feed-forward over tokens and text alike; `modulation` are weights that meet the noise level.

    `text_linear_params` are those of `linear_params` that text has of its own.
    """

    params: int
    width: int
    inner: int
    modulation: int
    text_linear_params: int = 0
    eight_bits: EightBits = "none"

    @property
    def linear_params(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.inner + self.text_linear_params

    @property
    def projection_params(self) -> int:
        return self.linear_params

    def linear_flops(self, tokens: Tokens) -> float:
        shared = self.linear_params - self.text_linear_params
        return 2 * (tokens.own * shared + tokens.text * (self.text_linear_params or shared))

    def held(self, eight_bits: EightBits) -> Self:
        return replace(self, eight_bits=eight_bits)

    def flops(self, tokens: Tokens) -> Flops:
        own, seen = tokens.own + tokens.text, tokens.seen + tokens.text
        return Flops(
            attention=4 * own * seen * self.width,
            projections=8 * own * self.width**2,
            feed_forward=4 * own * self.width * self.inner,
            levels=2 * self.modulation,
        )


def layer_bytes(layer: Layer, itemsize: int) -> int:
    """Of a layer's weights, with those in 8 bits where it has any; their scales are next to nothing."""
    in_8_bits = 0 if layer.eight_bits == "none" else layer.linear_params
    return itemsize * (layer.params - in_8_bits) + in_8_bits


# -------------------------------------------------------------------------------- weights packed for matrix units (AMX)

MOST_PACKED_BYTES = 128 << 20
"""What a stage may keep of packed linear weights: 21 million numbers in fp32, 64 million in bf16. Beyond, none."""


def packed_itemsize(itemsize: int) -> int:
    """Bytes of a packed weight: a float is three bf16."""
    return 6 if itemsize == 4 else 2


# ------------------------------------------------------------------------------------------------------- the video VAE

CELLS_AT_ONCE = 256
"""Of latents that go through a CPU's matrix units in one pass: with fewer, weights and calls take longer than they."""


TILE_OUTPUTS, TILE_DEPTH = 16, 32
"""Outputs and inputs of a convolution in a tile of matrix units (`longvid.kernels.convolve`)."""
COPIES = 2
"""Of what is around a VAE's convolution, values at once: a copy with its past and padding, or the upsampling's."""


@dataclass(frozen=True)
class Conv:
    """A convolution. A latent is `frames` of its outputs, the first of a shot `first`, of `cells` a latent cell each.

    `keeps` are past frames of its inputs that a causal one keeps. One that `doubles` comes after repetition in height
    and width: matrix units have four kernels of 2 x 2 for it, one a corner.
    """

    inputs: int
    outputs: int
    taps: int
    cells: float
    frames: int
    first: int
    keeps: int = 0
    doubles: bool = False

    @property
    def params(self) -> int:
        return linear(self.inputs * self.taps, self.outputs)

    @property
    def packed_params(self) -> int:
        """Weights in whole tiles of matrix units."""
        taps = 4 * 4 if self.doubles else self.taps
        return taps * -(-self.inputs // TILE_DEPTH) * TILE_DEPTH * -(-self.outputs // TILE_OUTPUTS) * TILE_OUTPUTS

    @property
    def flops(self) -> float:
        """Of a latent other than the first, a latent cell."""
        return 2 * self.inputs * self.outputs * self.taps * self.cells * self.frames


@dataclass
class Network:
    """An encoder or a decoder, put down one layer after the other at the level that `cells` and `frames` say."""

    cells: float = 1.0
    frames: int = 1
    first: int = 1
    convs: list[Conv] = field(default_factory=list)
    other_params: int = 0
    attention_widths: list[int] = field(default_factory=list)
    """Of self-attention within a frame, at the first level."""
    num_whole: int = 0
    """The first so many convolutions work on whole frames where the others work in bands of rows."""
    others: list[tuple[float, float]] = field(default_factory=list)
    """Where more is alive than around a convolution: values a latent cell and latent, and those of the new state."""
    in_units: list[tuple[float, float]] = field(default_factory=list)
    """What is alive where matrix units copy nothing: values a latent cell and latent, and those that will be kept."""

    def conv(
        self,
        inputs: int,
        outputs: int,
        taps: int = 27,
        *,
        keeps: int = 0,
        first: int | None = None,
        doubles: bool = False,
    ) -> None:
        at_first = self.first if first is None else first
        self.convs.append(Conv(inputs, outputs, taps, self.cells, self.frames, at_first, keeps, doubles))

    def alive(self, channels: float) -> None:
        """So many channels are alive at once at this level."""
        self.others.append((channels * self.cells * self.frames, self.state))

    def alive_in_units(self, channels: float, kept: float = 0.0) -> None:
        """So many channels are alive at once at this level, where matrix units convolve, and `kept` will be kept."""
        self.in_units.append((channels * self.cells * self.frames, kept * self.cells))

    def up(self, space: int = 2, time: int = 1) -> None:
        """What follows is finer: `space` in width and in height, `time` in frames but for the shot's first."""
        self.cells *= space**2
        self.frames *= time

    @property
    def params(self) -> int:
        return sum(conv.params for conv in self.convs) + self.other_params

    def flops(self, cells: int, num_latents: float, starts: bool) -> float:
        """Of `num_latents` latents with so many cells; `starts`: the first of them is a shot's first."""
        later = num_latents - starts
        convs = sum(conv.flops / conv.frames * (conv.frames * later + conv.first * starts) for conv in self.convs)
        attention = sum(4 * cells**2 * width for width in self.attention_widths)
        return convs * cells + attention * num_latents

    @property
    def state(self) -> float:
        """Values a latent cell that are kept from latent to latent."""
        return sum(conv.keeps * conv.inputs * conv.cells for conv in self.convs)

    @property
    def values(self) -> float:
        """Values a latent cell that all convolutions read and write, of a latent other than the first."""
        return sum((conv.inputs + conv.outputs) * conv.cells * conv.frames for conv in self.convs)

    def widest(self, together: float, makes_state: bool) -> float:
        """The most values at once, a latent cell, of a pass of so many latents.

        Beside the state that it goes on from; with `makes_state` it makes another one.
        """
        around = COPIES * max(map(_around, self.convs)) * together + makes_state * self.state
        return max([around, *(values * together + makes_state * made for values, made in self.others)])

    def widest_in_units(self, together: int) -> float:
        """The most values at once, a latent cell, of a pass of so many latents through matrix units."""
        return max(values * together + kept for values, kept in self.in_units)

    @property
    def packed_params(self) -> int:
        """Weights that matrix units have packed."""
        return sum(conv.packed_params for conv in self.convs)

    def widest_in_bands(self, cells: int, height: int, rows: int) -> float:
        """The most values at once of a latent of `height` rows, of which `rows` at a time are decoded.

        A band has a row more above and below. Each convolution keeps two rows of what came to it, and what goes around
        it, until the next band.
        """
        whole = max(map(_around, self.convs[: self.num_whole]))
        banded = self.convs[self.num_whole :]
        share = min(1.0, (rows + 2) / height)
        kept = sum(2 * (conv.frames + conv.keeps) * conv.inputs * sqrt(conv.cells) / height for conv in banded)
        return COPIES * cells * max(whole, share * max(map(_around, banded)) + kept)


def _around(conv: Conv) -> float:
    """Values that go into a convolution, its past ones and what comes out, a latent cell and latent."""
    return ((conv.frames + conv.keeps) * conv.inputs + conv.frames * conv.outputs) * conv.cells


@dataclass(frozen=True)
class Vae:
    """A video VAE. `together` latents are decoded in one pass; of these `repeated` times more than come out new.

    Of a tile's latents the first may count as less, for it has fewer frames. With `makes_state` a pass makes a new
    state beside the one that it goes on from. `has_own_kernels`: our convolutions decode where a CPU has matrix units.
    """

    params: int
    decoder: Network
    together: float = 1.0
    repeated: float = 1.0
    makes_state: bool = False
    has_own_kernels: bool = False

    def flops(self, cells: int, num_latents: int, starts: bool = False) -> float:
        """Of decoding so many latents of so many cells."""
        return self.repeated * self.decoder.flops(cells, num_latents, starts)

    def state_values(self, cells: int) -> float:
        """Values that live on between latents."""
        return self.decoder.state * cells

    def working_values(self, cells: int, height: int = 0, rows: int = 0, in_units: int = 0) -> float:
        """Values at once where most are, beside the state; with `rows`, of `height`, so many at a time; or with so many
        latents at once `in_units`, matrix units.
        """
        if rows:
            return self.decoder.widest_in_bands(cells, height, rows) * self.together
        if in_units:
            return self.decoder.widest_in_units(in_units) * cells
        return self.decoder.widest(self.together, self.makes_state) * cells


# ------------------------------------------------------------------------------------------------------ a whole model


@dataclass(frozen=True)
class Sizes:
    """A checkpoint's parts. `first`, `last` and `shared` are parameters that stages have, as `PartNames` says.

    `text_columns` is how many of them attention reads. `prompt_each_step`: whether K/V of the prompt are computed at
    every step.
    """

    layers: tuple[Layer, ...]
    first: int
    last: int
    shared: int
    patch_values: int
    """Values of a token as it enters and leaves."""
    vae: Vae
    text_params: int
    text_columns: int
    embed: Flops = Flops()
    """A pass of the ends, beside the tokens' own."""
    prompt_each_step: bool = True
    num_experts: int = 1

    @property
    def params(self) -> int:
        """Of one transformer."""
        return sum(layer.params for layer in self.layers) + self.first + self.last + self.shared

    def part_params(self, part: ModelPart) -> int:
        """Of what a stage holds, all experts."""
        layers = sum(self.layers[index].params for index in part.layers)
        ends = self.shared + self.first * part.is_first + self.last * part.is_last
        return self.num_experts * (layers + ends)

    def part_bytes(self, part: ModelPart, itemsize: int) -> int:
        """Bytes of the same."""
        layers = sum(layer_bytes(self.layers[index], itemsize) for index in part.layers)
        ends = self.shared + self.first * part.is_first + self.last * part.is_last
        return self.num_experts * (layers + itemsize * ends)

    def held(self, eight_bits: EightBits) -> Sizes:
        """With linear weights held so, but for those of the first and the last layer."""
        inner = tuple(layer.held(eight_bits) for layer in self.layers[1:-1])
        return replace(self, layers=(*self.layers[:1], *inner, *self.layers[1:][-1:]))

    def operations(self, flops: Flops) -> float:
        """Of a pass or a part of it, what is computed at every step."""
        return flops.total if self.prompt_each_step else flops.each_step

    def ends_flops(self, tokens: Tokens) -> Flops:
        """Patches in, and the output layer."""
        width = self.layers[0].width
        return self.embed + Flops(projections=4 * tokens.own * self.patch_values * width)

    def pass_flops(self, tokens: Tokens) -> Flops:
        """One pass of the whole transformer."""
        layers = Counter(self.layers)
        return sum((layer.flops(tokens) * count for layer, count in layers.items()), self.ends_flops(tokens))


def t5_params(config: Config, *, own_positions: bool) -> int:
    """A T5 encoder (gated feed-forward); `own_positions`: a table of relative positions a layer (UMT5), not one."""
    width, inner, heads = int(config["d_model"]), int(config["d_ff"]), int(config["num_heads"])
    layers, attention = int(config["num_layers"]), int(config["d_kv"]) * heads
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    layer = 4 * width * attention + (2 + is_gated) * width * inner + 2 * width
    positions = int(config.get("relative_attention_num_buckets", 32)) * heads * (layers if own_positions else 1)
    return int(config["vocab_size"]) * width + layers * layer + positions + width
