"""What ranks know of each other's messages beforehand: their shapes, and the unit that their headers name.

Both ends compute them, so that the executor can post receives ahead and nobody shakes hands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longvid.cache.runtime import CacheRuntime
from longvid.parallel.actions import LatentVersion
from longvid.parallel.rank_actions import (
    Border,
    DecoderState,
    Halfway,
    Hidden,
    KeptState,
    Message,
    Notice,
    Overlap,
    PieceFrames,
    PieceLatents,
    Seen,
    Velocity,
    Verdict,
)
from longvid.parallel.stage import DecoderPart, Stage, global_stage
from longvid.plan import ModelFacts, Plan

NOTHING = torch.empty(0)
"""What a message holds whose header says all."""


@dataclass(frozen=True)
class MessageShapes:
    """Shapes of messages to and from one rank; the fields are the executor's."""

    stage: Stage
    facts: ModelFacts
    latent_size: tuple[int, int]
    cache: CacheRuntime | None
    part: DecoderPart | None

    def of(self, message: Message, plan: Plan) -> tuple[Sequence[int], torch.dtype]:
        if isinstance(message, Verdict | Notice | KeptState | DecoderState | PieceFrames):
            return NOTHING.shape, NOTHING.dtype
        if isinstance(message, Seen):
            heads, tokens, width = global_stage(self.stage).part_shape
            return (len(message.latents), heads, tokens, width + 1), torch.float32
        if isinstance(message, PieceLatents | Halfway):
            return self._for_decoding(message, plan)
        chunk = plan.chunks[message.chunk]
        if isinstance(message, Hidden):
            num_latents = chunk.num_latents + chunk.num_left * message.with_left
            shape, dtype = self.stage.hidden_shape(num_latents, self.latent_size)
            if self.cache and self.cache.regions:
                num_own = shape[1] * chunk.num_latents // num_latents
                shape = (shape[0], self.cache.num_rows(shape[1], num_own, shape[2], message.step), shape[2])
            if message.with_tokens:
                shape = (shape[0], shape[1] + global_stage(self.stage).num_globals, shape[2])
            return shape, dtype
        count = chunk.num_latents
        if isinstance(message, Overlap):
            count = chunk.num_left
        elif isinstance(message, Border):
            count = plan.chunks[message.chunk + 1].num_left
        shape = (self.facts.latent_channels, count, *self.latent_size)
        if isinstance(message, Velocity | Overlap):
            return (self.stage.num_branches, *shape), torch.float32
        return shape, torch.float32

    def _for_decoding(self, message: PieceLatents | Halfway, plan: Plan) -> tuple[Sequence[int], torch.dtype]:
        if isinstance(message, Halfway):
            assert self.part is not None
            return self.part.shape(plan.chunks[message.chunk])
        count = message.piece.stop - message.piece.first
        return (self.facts.latent_channels, count, *self.latent_size), torch.float32

    def is_sized(self, message: Message) -> bool:
        """With a cache that leaves layers out, a unit's messages may be empty, or hold more than hidden states.

        What the decoder makes of a shot's first chunk has fewer frames.
        """
        if isinstance(message, Halfway):
            return True
        return self.cache is not None and isinstance(message, Hidden | Velocity | Overlap | Verdict)


def is_made(message: Message) -> bool:
    """Whether a message holds what a decoder made: bytes on the CPU, of which its sender alone knows how many."""
    return isinstance(message, PieceFrames | DecoderState) or (isinstance(message, KeptState) and not message.is_asked)


def unit_of(message: Message) -> tuple[int, int]:
    """Chunk and step, as its header says them."""
    match message:
        case LatentVersion(chunk=i, version=k):
            return i, k
        case Notice(round=n):
            return -1, n
        case Halfway(chunk=i):
            return i, -1
        case PieceLatents(piece=piece) | PieceFrames(piece=piece) | DecoderState(piece=piece):
            return piece.chunk, piece.first
        case KeptState(film=film, round=n):
            return film, n
        case _:
            return message.chunk, message.step
