"""What the work of a film takes on a machine: by a chip's data sheet, or by what was measured here. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from longvid.chips import Chip
from longvid.models.sizes import Layer, Sizes, Tokens, layer_bytes
from longvid.parallel.partition import Costs
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts
from longvid.settings import MemorySettings, Settings

VAE_SHARE = 0.5
"""Of what layers attain, what the convolutions of a VAE are taken to: they are narrow where they are many."""
MERGED = 6
"""How often each fp32 value of attention's output is read or written when a ring's partial results meet."""
HOST_SHARE = 0.8
"""Of PCIe's rate, what copies from pinned memory attain."""
HOST_GB = 32.0
"""10^9 bytes a second from host memory, taken for a device that was measured: PCIe 4.0 x16."""
DISK_GB = 5.0
"""10^9 bytes a second that the ranks of a machine read together: of an NVMe drive on PCIe 4.0 x4, of 7 stated."""
GB = 1e9


class Machine(Protocol):
    """Times in seconds, of one rank's share."""

    @property
    def name(self) -> str: ...

    @property
    def memory_gb(self) -> float:
        """That a rank may fill."""
        ...

    @property
    def has_matrix_units(self) -> bool:
        """Whether it is a CPU with matrix units that our kernels use."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What else people should know of it."""
        ...

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        """One pass of one branch through a layer, exchange of tokens included."""
        ...

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        """Patches in or out."""
        ...

    def decode(self, cells: int, work: float, starts: bool) -> float:
        """So many latents of so many cells go through the decoder; `starts`: the first is a shot's, of one frame."""
        ...

    def hop(self, num_bytes: float, topology: Topology) -> float:
        """A message from a stage to the next."""
        ...

    def pack(self, num_bytes: float) -> float:
        """To give the decoder's state to another rank, or to take it, by way of the host's memory."""
        ...

    def overhead(self, topology: Topology) -> float:
        """Of a unit on a stage, besides computing: bookkeeping, the solver, and what messages take of its time."""
        ...

    def fetch(self, num_bytes: float, memory: MemorySettings, topology: Topology) -> float:
        """Weights from where `memory.offload` has them."""
        ...


def unit_tokens(settings: Settings, facts: ModelFacts, sizes: Sizes, size: tuple[int, int]) -> Tokens:
    """Those of a unit as most of a film's are, of so many pixels (width, height)."""
    chunk, context = settings.queue.chunk_latents, settings.queue.context_latents
    per_latent, is_cached = facts.grid.tokens_per_latent(*size), not settings.recomputes_left
    own = (chunk + context * (not is_cached)) * per_latent
    seen = own + context * (1 + is_cached) * per_latent * (settings.schedule == "queue")
    return Tokens(own, seen, sizes.text_columns)


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
    def has_matrix_units(self) -> bool:
        return False

    @property
    def notes(self) -> Sequence[str]:
        return ()

    @property
    def memory_gb(self) -> float:
        return self.chip.memory_gb - self.reserved_gb

    @property
    def rate(self) -> float:
        """FLOPs a second that layers attain."""
        chip = self.chip
        tflops = chip.tflops * chip.attained if self.itemsize == 2 else chip.fp32 * chip.fp32_attained
        return tflops * 1e12

    @property
    def rate_of_8_bits(self) -> float:
        """Operations a second that int8 matrices attain: the share that bf16 does."""
        return self.chip.tops * 1e12 * self.chip.attained

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        seq, flops = topology.seq, layer.flops(tokens)
        # Each value of a token is read or written that often: norms, projections, rotation, attention, sums.
        values = tokens.own / seq * (32 * layer.width + 4 * layer.inner)
        moved = values * self.itemsize + layer_bytes(layer, self.itemsize)
        # Weights alone in 8 bits are multiplied in 16: only with activations in 8 bits, too, it goes faster.
        in_8_bits = layer.linear_flops(tokens) if layer.eight_bits == "w8a8" else 0.0
        seconds = (self.sizes.operations(flops) - in_8_bits) / self.rate + in_8_bits / self.rate_of_8_bits
        computing = max(seconds / seq, moved / (self.chip.bandwidth * GB))
        return computing + self._exchange(layer, tokens, topology, flops.attention / seq / self.rate)

    def _exchange(self, layer: Layer, tokens: Tokens, topology: Topology, attention: float) -> float:
        """Queries, keys, values and outputs in Ulysses; K/V in a ring, as far as attention is faster, and merging."""
        if topology.seq == 1:
            return 0.0
        link = (self.chip.link if topology.seq <= self.chip.node else self.chip.network) * GB
        inside = (self.chip.link if topology.ulysses <= self.chip.node else self.chip.network) * GB
        ulysses, ring = topology.ulysses, topology.ring
        value = layer.width * self.itemsize
        latency = self.chip.latency
        heads = 4 * tokens.own / topology.seq * value * (1 - 1 / ulysses) / inside + 4 * latency * (ulysses > 1)
        block = 2 * tokens.seen / ring * value / ulysses / link + latency
        merged = MERGED * tokens.own / topology.seq * layer.width * 4 / (self.chip.bandwidth * GB)
        return heads + (ring - 1) * (max(0.0, block - attention / ring) + merged)

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        return self.sizes.operations(self.sizes.ends_flops(tokens)) / topology.seq / self.rate / 2

    def decode(self, cells: int, work: float, starts: bool) -> float:
        decoder = self.sizes.vae.decoder
        moved = 2 * decoder.values * cells * work * self.itemsize
        computing = decoder.flops(cells, work, starts) / (self.rate * VAE_SHARE)
        return max(computing, moved / (self.chip.bandwidth * GB))

    def hop(self, num_bytes: float, topology: Topology) -> float:
        speed = self.chip.link if topology.num_ranks <= self.chip.node else self.chip.network
        return self.chip.latency + num_bytes / (speed * GB)

    def pack(self, num_bytes: float) -> float:
        return num_bytes / (self.chip.host * HOST_SHARE * GB)

    def overhead(self, topology: Topology) -> float:
        """None: programs run ahead of the device."""
        return 0.0

    def fetch(self, num_bytes: float, memory: MemorySettings, topology: Topology) -> float:
        return fetch_seconds(num_bytes, memory, self.chip.host, min(topology.num_ranks, self.chip.node))


def fetch_seconds(num_bytes: float, memory: MemorySettings, host_gb: float, ranks_a_machine: int) -> float:
    """Weights from host memory, each rank by its own way, or from the disk that they share."""
    if memory.offload == "host":
        return num_bytes / (host_gb * HOST_SHARE * GB)
    return num_bytes * ranks_a_machine / (DISK_GB * GB)


@dataclass(frozen=True)
class MeasuredMachine:
    """This machine: times of a typical unit, measured, and others by their operations.

    `costs` are of `unit`, one branch; their `decode` is of `work` latents of `cells` cells that go through the decoder,
    not of a step.
    `unit_s` are seconds of a unit's bookkeeping and its solver, `message_s` those of the processor for a message that
    is sent and one that is received. `loopback_gb` are 10^9 bytes a second between processes, `packing_gb` those of a
    decoder's state that is packed or unpacked.
    """

    name: str
    memory_gb: float
    sizes: Sizes
    costs: Costs
    unit: Tokens
    cells: int
    work: float
    notes: Sequence[str] = ()
    unit_s: float = 0.0
    message_s: float = 0.0
    loopback_gb: float = 1.0
    packing_gb: float = 1.0
    has_matrix_units: bool = False

    def layer(self, layer: Layer, tokens: Tokens, topology: Topology) -> float:
        operations = self.sizes.operations
        share = operations(layer.flops(tokens)) / operations(layer.flops(self.unit))
        exchanged = 4 * tokens.own / topology.seq * layer.width * 4 * (1 - 1 / topology.seq)
        cost = self.costs.layers[self.sizes.layers.index(layer)]
        return cost * share / topology.seq + exchanged / (self.loopback_gb * GB)

    def ends(self, tokens: Tokens, topology: Topology) -> float:
        return self.costs.first * tokens.own / self.unit.own / topology.seq

    def decode(self, cells: int, work: float, starts: bool) -> float:
        flops = self.sizes.vae.decoder.flops
        return self.costs.decode * flops(cells, work, starts) / flops(self.cells, self.work, False)

    def hop(self, num_bytes: float, topology: Topology) -> float:
        return num_bytes / (self.loopback_gb * GB)

    def pack(self, num_bytes: float) -> float:
        return num_bytes / (self.packing_gb * GB)

    def overhead(self, topology: Topology) -> float:
        return self.unit_s + self.message_s * (topology.stage > 1)

    def fetch(self, num_bytes: float, memory: MemorySettings, topology: Topology) -> float:
        return fetch_seconds(num_bytes, memory, HOST_GB, topology.num_ranks)
