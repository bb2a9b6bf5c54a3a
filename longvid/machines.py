"""What the work of a film takes on a machine: by a chip's data sheet, or by what was measured here. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from longvid.chips import Chip
from longvid.models.sizes import Flops, Layer, Sizes, Tokens
from longvid.parallel.partition import Costs
from longvid.parallel.topology import Topology

VAE_SHARE = 0.5
"""Of what layers attain, what the convolutions of a VAE are taken to: they are narrow where they are many."""
MERGED = 6
"""How often each fp32 value of attention's output is read or written when a ring's partial results meet."""
MESSAGE_S = 20e-6
"""Seconds until the first byte of a message is there."""
GB = 1e9


class Machine(Protocol):
    """Times in seconds, of one rank's share."""

    @property
    def name(self) -> str: ...

    @property
    def memory_gb(self) -> float:
        """That a rank may fill."""
        ...

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        """One pass of one branch through a layer, exchange of tokens included."""
        ...

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        """Patches in or out."""
        ...

    def decode(self, cells: int, num_latents: int, starts: bool) -> float:
        """Latents of so many cells to frames; `starts`: they begin a shot."""
        ...

    def hop(self, num_bytes: float, topology: Topology) -> float:
        """A message from a stage to the next."""
        ...


def operations(flops: Flops, sizes: Sizes) -> float:
    """What is computed at every step."""
    return flops.total if sizes.prompt_each_step else flops.each_step


@dataclass(frozen=True)
class ChipMachine:
    """Accelerators of one kind: the larger of operations by the attained rate and bytes by the bandwidth."""

    chip: Chip
    sizes: Sizes
    itemsize: int
    reserved_gb: float = 1.5
    """Of CUDA itself, NCCL, and what an allocator cannot use."""

    @property
    def name(self) -> str:
        return self.chip.name

    @property
    def memory_gb(self) -> float:
        return self.chip.memory_gb - self.reserved_gb

    @property
    def rate(self) -> float:
        """FLOPs a second that layers attain."""
        share = self.chip.attained if self.itemsize == 2 else self.chip.attained * self.chip.fp32_share
        return self.chip.tflops * 1e12 * share

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        seq, flops = topology.seq, layer.flops(tokens)
        # Each value of a token is read or written that often: norms, projections, rotation, attention, sums.
        values = tokens.own / seq * (32 * layer.width + 4 * layer.inner)
        moved = (values + layer.params) * self.itemsize
        computing = max(operations(flops, self.sizes) / seq / self.rate, moved / (self.chip.bandwidth * GB))
        return computing + self._exchange(layer, tokens, topology, flops.attention / seq / self.rate)

    def _exchange(self, layer: Layer, tokens: Tokens, topology: Topology, attention: float) -> float:
        """Queries, keys, values and outputs in Ulysses; K/V in a ring, as far as attention is faster, and merging."""
        if topology.seq == 1:
            return 0.0
        link = (self.chip.link if topology.seq <= self.chip.node else self.chip.network) * GB
        inside = (self.chip.link if topology.ulysses <= self.chip.node else self.chip.network) * GB
        ulysses, ring = topology.ulysses, topology.ring
        value = layer.width * self.itemsize
        heads = 4 * tokens.own / topology.seq * value * (1 - 1 / ulysses) / inside + 4 * MESSAGE_S * (ulysses > 1)
        block = 2 * tokens.seen / ring * value / ulysses / link + MESSAGE_S
        merged = MERGED * tokens.own / topology.seq * layer.width * 4 / (self.chip.bandwidth * GB)
        return heads + (ring - 1) * (max(0.0, block - attention / ring) + merged)

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        return operations(self.sizes.ends_flops(tokens), self.sizes) / topology.seq / self.rate / 2

    def decode(self, cells: int, num_latents: int, starts: bool) -> float:
        vae = self.sizes.vae
        moved = 2 * vae.decoder.values * cells * num_latents * vae.repeated * self.itemsize
        computing = vae.flops(cells, num_latents, starts) / (self.rate * VAE_SHARE)
        return max(computing, moved / (self.chip.bandwidth * GB))

    def hop(self, num_bytes: float, topology: Topology) -> float:
        speed = self.chip.link if topology.num_ranks <= self.chip.node else self.chip.network
        return MESSAGE_S + num_bytes / (speed * GB)


@dataclass(frozen=True)
class MeasuredMachine:
    """This machine: times of a typical unit, measured, and others by their operations.

    `costs` are of `unit`, one branch; their `decode` is of `latents` latents of `cells` cells, not of a step.
    """

    name: str
    memory_gb: float
    sizes: Sizes
    costs: Costs
    unit: Tokens
    cells: int
    latents: int
    loopback_gb: float = 1.0
    """10^9 bytes a second between processes, taken for what is not measured."""

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        share = operations(layer.flops(tokens), self.sizes) / operations(layer.flops(self.unit), self.sizes)
        exchanged = 4 * tokens.own / topology.seq * layer.width * 4 * (1 - 1 / topology.seq)
        return self.costs.layers[0] * share / topology.seq + exchanged / (self.loopback_gb * GB)

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        return self.costs.first * tokens.own / self.unit.own / topology.seq

    def decode(self, cells: int, num_latents: int, starts: bool) -> float:
        flops = self.sizes.vae.flops
        return self.costs.decode * flops(cells, num_latents, starts) / flops(self.cells, self.latents)

    def hop(self, num_bytes: float, topology: Topology) -> float:
        return num_bytes / (self.loopback_gb * GB)
