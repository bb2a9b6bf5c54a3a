"""Ranks that own chunks decode together: each has some of the decoder's layers, or some rows of every latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.errors import InputError
from longvid.models.checkpoint import Condition, PartsDecoder, StreamDecoder
from longvid.parallel.decoding_roles import DecodingOwners
from longvid.parallel.topology import Topology
from longvid.plan import Chunk, ModelFacts
from longvid.settings import Settings


def decoding_owners(settings: Settings, facts: ModelFacts, topology: Topology, device: torch.device) -> DecodingOwners:
    """Who decodes with the leader: owners of chunks, for all finish theirs at once.

    On a GPU they do so by rows alone: there the layers of a whole decode are diffusers', which round otherwise.
    Raises InputError for rows together with stages.
    """
    chosen = settings.mesh.decode
    if chosen == "rows" and topology.stage > 1:
        raise InputError(f"mesh.decode=rows: ranks of chunk share rows, so mesh.stage must be 1, not {topology.stage}")
    if topology.stage > 1 or chosen == "leader" or settings.memory.vae_rows:
        return DecodingOwners()
    if chosen == "rows":
        return DecodingOwners(topology.chunk, by_rows=True)
    parts = facts.decoder_parts if device.type == "cpu" else 1
    return DecodingOwners(min(topology.chunk, parts))


@dataclass(frozen=True)
class RowsPart:
    """This rank's rows in decoding, for the executor; the leader deals out the latents."""

    decoder: StreamDecoder

    def hand_on(self, chunk: Chunk, x: Tensor) -> Tensor:
        if chunk.start == 0:
            self.decoder.reset()
        return self.decoder.push(x)

    def shape(self, chunk: Chunk) -> tuple[Sequence[int], torch.dtype]:
        raise AssertionError(f"nothing of chunk {chunk.index} goes from rank to rank but rows")


@dataclass(frozen=True)
class LayersPart:
    """This rank's part of the decoder, for the executor. `images` are the shots'; `latent_size` is (h, w)."""

    decoder: PartsDecoder
    images: Sequence[Condition | None]
    latent_size: tuple[int, int]
    is_first: bool

    def hand_on(self, chunk: Chunk, x: Tensor) -> Tensor:
        if chunk.start == 0:
            self.decoder.reset()
        image = self.images[chunk.shot] if self.is_first else None
        return self.decoder.hand_on(image.show(x, chunk) if image else x)

    def shape(self, chunk: Chunk) -> tuple[Sequence[int], torch.dtype]:
        return self.decoder.handed_shape(chunk.num_latents, *self.latent_size)
