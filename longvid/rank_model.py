"""What one rank has of a model: layers as a stage, the decoder or a part of it; on the leader prompts and images, too.

The engine loads it once, from the checkpoint that it was given, and renders any number of films with it. Layers and
decoding are dealt out here by what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from longvid.cache.make import make_cache
from longvid.cache.plan import CachePlan
from longvid.cache.runtime import CacheRuntime
from longvid.decoding_parts import LayersPart, RowsPart, decoding_owners
from longvid.models.checkpoint import (
    Checkpoint,
    Condition,
    FamilyStage,
    PartsDecoder,
    RowsDecoder,
    SharedRowsDecoder,
    StageOptions,
)
from longvid.models.costs import measure_costs
from longvid.models.loader import open_loading
from longvid.models.parts import ModelPart
from longvid.models.prompt_cache import open_prompts
from longvid.parallel.collectives import broadcast
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decoding, Shares, deal_work
from longvid.parallel.mesh import Mesh
from longvid.parallel.partition import Costs
from longvid.parallel.rules import rules_of
from longvid.parallel.sequence import make_sequence
from longvid.parallel.stage import DecoderPart
from longvid.plan import Plan
from longvid.settings import Settings
from longvid.sparsity.runtime import SparseRuntime


class RankModel:
    """Loads it; all ranks do so together. `decoder` is there where `decodes` or `has_part` says so."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        mesh: Mesh,
        device: torch.device,
        *,
        attention: SparseRuntime | None,
        cache: CacheRuntime | None,
        cache_plan: CachePlan,
        vin: Path | None,
    ) -> None:
        self.settings, self.mesh, self.device = settings, mesh, device
        self.cache, self._cache_plan = cache, cache_plan
        self._passes = checkpoint.facts.decoder_passes
        dtype = getattr(torch, settings.runtime.dtype)
        self._loading = open_loading(checkpoint, settings, device, mesh.seq)
        self.costs: Costs | None = None
        """Measured where layers are split over stages."""
        self.shares: Shares | None = None
        """Where stages decode: how that is dealt out."""
        self.owners_decode = decoding_owners(settings, checkpoint.facts, mesh.topology, device)
        if mesh.is_leader:
            self.prompts = open_prompts(checkpoint, settings.memory, dtype, device)
        if mesh.is_leader or self.has_part:
            self._load_decoder(checkpoint, dtype)
        if mesh.is_leader:
            self.images = checkpoint.load_images(self.decoder, dtype, device)
        self.stage = self._load_stage(checkpoint, dtype, attention, vin)

    def _load_stage(
        self, checkpoint: Checkpoint, dtype: torch.dtype, attention: SparseRuntime | None, vin: Path | None
    ) -> FamilyStage:
        """This rank's layers, dealt out by what they cost."""
        mesh = self.mesh
        layers = range(checkpoint.facts.num_layers)
        if mesh.topology.stage > 1:
            measured = measure_costs(checkpoint, self.decoder, self.settings, self.device) if mesh.is_leader else None
            self.costs = broadcast(measured)
            assert self.costs is not None
            bounds, self.shares = self.dealt_work()
            layers = bounds[mesh.place.stage]
        if self.decodes and not mesh.is_leader:
            self._load_decoder(checkpoint, dtype)
        self.layers = layers
        self.cache = self.cache or make_cache(self._cache_plan, layers, mesh.topology.guidance)
        part = ModelPart(layers, mesh.is_first, mesh.is_last)
        branches = range(self.settings.sampler.num_branches)
        options = StageOptions(
            branches=branches if mesh.topology.guidance == 1 else [branches[mesh.place.guidance]],
            sequence=make_sequence(self.settings.sequence.backend, mesh.ulysses, mesh.ring, mesh.seq),
            attention=attention,
            cache=self.cache,
            loading=self._loading,
            embedded_guidance=self.settings.sampler.embedded_guidance,
            vin=vin,
            linear=self.settings.runtime.linear,
        )
        return checkpoint.load_stage(part, dtype, self.device, options)

    def _load_decoder(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.decoder = checkpoint.load_decoder(dtype, self.device)
        if self.settings.memory.vae_rows:
            cast(RowsDecoder, self.decoder).split_rows(self.settings.memory.vae_rows)
        if self.has_part:
            self._take_part()

    def _take_part(self) -> None:
        size = self.owners_decode.size
        if self.owners_decode.by_rows:
            cast(SharedRowsDecoder, self.decoder).share_rows(self.mesh.owners)
        else:
            cast(PartsDecoder, self.decoder).take_part(size - 1 - self.mesh.place.chunk, size)

    def dealt_work(self) -> tuple[tuple[range, ...], Shares | None]:
        """Each stage's layers, and what it decodes."""
        assert self.costs is not None, "costs are measured where there are several stages"
        chosen = self.settings
        return deal_work(self.costs, self.mesh.topology.stage, chosen.mesh.decode)

    @property
    def has_part(self) -> bool:
        """Whether this rank decodes together with others: some of the layers, or some rows."""
        size = self.owners_decode.size
        return self.mesh.is_owner and self.mesh.place.chunk < size and size > 1

    @property
    def decodes(self) -> bool:
        """Whether this rank has a decoder."""
        place = self.mesh.place
        is_first = place.chunk == place.guidance == place.seq == 0
        return self.mesh.is_leader or bool(self.shares and is_first and self.shares.of_stages[place.stage])

    def decoding(self, plan: Plan) -> StageDecoding | None:
        rules, steps = rules_of(self.settings), self.settings.sampler.steps
        return StageDecoding(Decoding.of(self.shares, plan, rules, steps, self._passes)) if self.shares else None

    def part_in_decoding(self, images: Sequence[Condition | None], latent_size: tuple[int, int]) -> DecoderPart | None:
        if not self.has_part:
            return None
        if self.owners_decode.by_rows:
            return RowsPart(self.decoder)
        is_first = self.mesh.place.chunk + 1 == self.owners_decode.size
        return LayersPart(cast(PartsDecoder, self.decoder), images, latent_size, is_first)
