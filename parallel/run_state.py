"""The state of a run: every value that one rank holds, under the name that the Actions give it.

The executor makes and drops values as the Actions say; checkpoints (`longvid/checkpoint.py`) save what lives across the
end of a round, and give it back to a run that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from longvid.parallel.actions import Edge, GlobalVersion, KvVersion, LatentVersion, OverlapVersion
from longvid.parallel.decoding import Piece
from longvid.parallel.stage import Begun, KvSpan
from longvid.plan import Chunk
from longvid.sampler import Solver

KEPT = -1
"""The round of K/V that a checkpoint holds because a cache keeps them."""


@dataclass(frozen=True)
class Finished:
    """A chunk's finished latents fp32 [C, num_latents, h, w], the receiver's to keep.

    Where several ranks decode, `halfway` is what the others made of them; or, where stages do, `frames` are uint8
    [T, H, W, 3]: as many as the decoder has given.
    """

    chunk: Chunk
    latents: Tensor
    frames: Tensor | None = None
    halfway: Tensor | None = None


@dataclass
class Live:
    """All state of a run. Across the end of a round live latents, solvers and the K/V of cached left context.

    Of latents that other ranks own, `borders` are what is seen as left context. Parts of velocities and `overlaps` are
    of one branch or more each. With a cache, `kept` are the last K/V of each edge of the chunks in flight, which units
    that are left out hand on.
    """

    latents: dict[LatentVersion, Tensor] = field(default_factory=dict)
    borders: dict[LatentVersion, Tensor] = field(default_factory=dict)
    kv: dict[KvVersion, KvSpan] = field(default_factory=dict)
    solvers: dict[int, Solver] = field(default_factory=dict)
    velocity: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    overlaps: dict[OverlapVersion, list[Tensor]] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, Edge], KvSpan] = field(default_factory=dict)
    begun: dict[tuple[int, int], Begun] = field(default_factory=dict)
    left_out: set[tuple[int, int]] = field(default_factory=set)
    tokens: dict[GlobalVersion, Tensor] = field(default_factory=dict)
    brought: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Global tokens that units bring along from the stage before."""
    halfway: dict[int, Tensor] = field(default_factory=dict)
    """Chunks on their way through the decoder."""
    seen: dict[LatentVersion, Tensor] = field(default_factory=dict)
    """What global tokens see of each chunk's key latents, packed: see `longvid.parallel.vin`."""
    finished: dict[int, Tensor] = field(default_factory=dict)
    """On the leader, finished latents of chunks that are not shown yet."""
    pieces: dict[Piece, Tensor] = field(default_factory=dict)
    """On other ranks, latents that are to be decoded here."""
    frames: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """What was decoded, by chunk and the first latent of its piece."""
