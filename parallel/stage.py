"""What a stage of a model is to the executor: units come in, and hidden states or velocities go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longvid.plan import Chunk

KvSpan = object
"""K/V of all layers of a stage for a span of latents: only the stage that made it looks inside."""


@dataclass(frozen=True)
class Unit:
    """One pass of a chunk through a stage. Legend: C channels, F latents that enter as tokens, h and w of a latent.

    F is the chunk's own latents, behind the left context where that is recomputed. `timesteps` fp32 [F], one for each
    latent; `latent_size` is (h, w). On the first stage `latents` fp32 [C, F, h, w], to be read only; on the others
    `hidden`, as the stage before gave it. `left` and `right` are neighbours' K/V or None; `store` says of which latents
    (as indices into F) K/V must be returned.

    `shared` is how the scene before ended, for the layers of `sharing`, counted in the stage; with `stores_scene`, the
    last of `store` is such an end, of which only those layers need keep K/V.

    With a cache, `is_left_out` says that a gate left the step's span of layers out, and `kept` are the K/V that an
    earlier step returned for each of `store`, for the layers that do not run. The first `num_branches` of the stage's
    branches run. `tokens` [branches, G, D] are the global tokens that its layers read, if any. The velocity of the last
    `num_overlap` latents of the left context is asked for, too.
    """

    chunk: Chunk
    step: int
    timesteps: Tensor
    latent_size: tuple[int, int]
    latents: Tensor | None = None
    hidden: Tensor | None = None
    left: KvSpan | None = None
    right: KvSpan | None = None
    store: tuple[slice, ...] = ()
    is_left_out: bool = False
    kept: tuple[KvSpan, ...] = ()
    num_branches: int = 2
    shared: KvSpan | None = None
    stores_scene: bool = False
    sharing: range = range(0)
    tokens: Tensor | None = None
    num_overlap: int = 0

    @property
    def num_predicted(self) -> int:
        """Latents whose velocity is asked for: the last of F."""
        return self.num_overlap + self.chunk.num_latents


class DecoderPart(Protocol):
    """Some of the decoder's layers, or some rows in all of them."""

    def hand_on(self, chunk: Chunk, x: Tensor) -> Tensor:
        """What they make of a chunk's finished latents, or of what the part before them made."""
        ...

    def shape(self, chunk: Chunk) -> tuple[Sequence[int], torch.dtype]:
        """Of what the part before them makes of a chunk; the first number says nothing."""
        ...


class PieceDecoder(Protocol):
    """What a rank has for decoding: its decoder, in the place in each film whose state is here."""

    keeps_endings: bool
    """Whether the states at the ends of films are asked for."""

    def decode(self, film: int, chunk: Chunk, latents: range, values: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] on the CPU of the next latents of a film, fp32 [C, F, h, w]: some of a chunk's."""
        ...

    def packed(self, film: int) -> Tensor:
        """Where the decoder is in a film, as bytes on the CPU: uint8 [n]."""
        ...

    def forget(self, film: int) -> None:
        """Another rank goes on, or the film is complete."""
        ...

    def go_on(self, film: int, packed: Tensor) -> None:
        """Go on where another rank was."""
        ...

    def keep(self, film: int, packed: Tensor) -> None:
        """On the leader: this is where a decoder was, for a checkpoint or the film's end."""
        ...


@dataclass(frozen=True)
class KeyLatents:
    """What global tokens are made of: K key latents fp32 [C, K, h, w] of a shot, each with its noise level.

    `timesteps` fp32 [K]; `places` fp32 [K], latents before the newest; `prompts` are those that they follow.
    """

    latents: Tensor
    timesteps: Tensor
    places: Tensor
    prompts: tuple[int, ...]


@dataclass(frozen=True)
class Begun:
    """A unit that came as far as the gate: `probe` is what decides, None where this rank has no say; `work` goes on."""

    unit: Unit
    probe: Tensor | None
    work: object


@dataclass(frozen=True)
class Output:
    """What a stage makes of a unit: `velocity` fp32 [branches, C, num_predicted, h, w] of the own latents on the last
    stage, and `hidden` [branches, tokens, E] on the others; `kv` for each span of `Unit.store`.

    A branch is a prompt's or its negative's; with guidance over two ranks each has one of them. Inside a span of layers
    that a cache remembers, `hidden` [2 · branches, tokens, E] also holds what entered the span.
    """

    hidden: Tensor | None = None
    velocity: Tensor | None = None
    kv: tuple[KvSpan, ...] = ()


class Stage(Protocol):
    """Some layers of a model, on one rank."""

    @property
    def num_branches(self) -> int:
        """Branches that it runs: 1, or 2 with guidance on the same rank."""
        ...

    def forward(self, unit: Unit) -> Output: ...

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `hidden` for a unit of F latents of (h, w)."""
        ...


@runtime_checkable
class GatedStage(Stage, Protocol):
    """A stage that can stop at a cache's gate."""

    def begin(self, unit: Unit) -> Begun:
        """The layers up to the gate."""
        ...

    def go_on(self, begun: Begun, *, is_left_out: bool) -> Output:
        """The layers behind the gate, without the step's span if that is left out."""
        ...


@runtime_checkable
class GlobalStage(Stage, Protocol):
    """A stage whose layers read global tokens (VIN), and which makes them, if it is the first."""

    @property
    def num_globals(self) -> int:
        """G; 0 where no layer reads any."""
        ...

    @property
    def key_spacing(self) -> int:
        """One latent in so many is a key latent."""
        ...

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """[H, G, d] of what the tokens see of some key latents, in so many heads."""
        ...

    def encode(self, keys: KeyLatents) -> Tensor:
        """Global tokens [branches, G, D], in the dtype of activations."""
        ...

    def look(self, keys: KeyLatents) -> tuple[Tensor, Tensor]:
        """What the tokens see of some of the key latents: output [H, G, d] and natural LSE [H, G]."""
        ...

    def conclude(self, seen: tuple[Tensor, Tensor], prompts: Sequence[int]) -> Tensor:
        """Global tokens, as `encode` gives them, of what they see of all key latents."""
        ...


def gated_stage(stage: Stage) -> GatedStage:
    assert isinstance(stage, GatedStage), "a schedule with gates needs stages that stop there"
    return stage


def global_stage(stage: Stage) -> GlobalStage:
    assert isinstance(stage, GlobalStage), "a schedule with global tokens needs stages that read them"
    return stage
