"""This machine as a `Machine`: layers, the decoder, a unit's bookkeeping and messages, measured at the film's size.

Ranks on the cores of one processor share its memory, caches and clock, so each is slower than it is alone. So all ranks
that there will be measure, each in a process of its own and at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from longvid.decode import pack_state, unpack_state
from longvid.doctor import cpu_facts
from longvid.errors import RuntimeFailure
from longvid.kernels.matmul import has_matrix_units
from longvid.launch.env import rank_of
from longvid.launch.local import end_with_supervisor, run_local
from longvid.machines import MeasuredMachine, unit_tokens
from longvid.meshes import Film, long_film
from longvid.models.checkpoint import Checkpoint
from longvid.models.costs import measure_costs
from longvid.models.facts import facts_of, sizes_of
from longvid.models.loader import open_checkpoint
from longvid.parallel.collectives import connect, disconnect, meet
from longvid.parallel.comm import Comm, DistComm, Header
from longvid.parallel.executor import Executor
from longvid.parallel.partition import Costs
from longvid.parallel.schedule import queue_schedule
from longvid.parallel.stage import Output, Unit
from longvid.ranks import pick_device, set_threads
from longvid.settings import load_settings

PATIENCE_S = 20.0
"""What measuring may take, of layers and of the decoder each: longer than a render takes for it, to be exact."""
EXCHANGES, LARGE_EXCHANGES = 40, 4
"""Messages that are measured, of a unit's size and of LARGE_BYTES; the first of each warms up."""
LARGE_BYTES = 4 << 20
CACHE_BYTES = 16 << 20
"""Written between what is short, as layers do in a film: it has nothing left in the processor's nearer caches then."""
_AS_RANK = "import sys; from longvid.measured import measure_as_rank; measure_as_rank(*sys.argv[1:])"


@dataclass(frozen=True)
class Found:
    """What was measured on one rank, as `MeasuredMachine` has it; `costs` as `measure_costs` gives them."""

    costs: Costs
    unit_s: float
    message_s: float = 0.0
    loopback_gb: float = 1.0
    packing_gb: float = 1.0


def measure_machine(film: Film, num_ranks: int, comm: Comm | None = None) -> MeasuredMachine:
    """Measure with the threads that each of `num_ranks` ranks would have here, and all of them at work.

    `comm` is that of so many ranks that call this together; None: on a CPU they are started for it, so call it from the
    main thread. Raises InputError without weights, RuntimeFailure where a rank fails.
    """
    settings, device = film.settings, pick_device(film.settings)
    if comm is None and num_ranks > 1 and device.type == "cpu":
        found = _on_ranks(film, num_ranks)
    else:
        found = _measure(film, num_ranks, device, comm)
    at = found.costs.measured_at
    return MeasuredMachine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else str(cpu_facts()["name"]),
        memory_gb=_memory_gb(device) / (1 if device.type == "cuda" else num_ranks),
        sizes=film.sizes,
        costs=replace(found.costs, decode=found.costs.decode * settings.sampler.steps),
        unit=unit_tokens(settings, film.facts, film.sizes, (film.plan.width, film.plan.height)),
        cells=film.cells,
        work=settings.queue.chunk_latents * film.facts.decoder_passes.repeated,
        notes=[f"measured at {at[0]} x {at[1]}, and scaled by operations"] if at else [],
        unit_s=found.unit_s,
        message_s=found.message_s,
        loopback_gb=found.loopback_gb,
        packing_gb=found.packing_gb,
        has_matrix_units=device.type == "cpu" and has_matrix_units(),
    )


def _memory_gb(device: torch.device) -> float:
    """All of the device's, 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


# -------------------------------------------------------------------------------------------------------- several ranks


def _on_ranks(film: Film, num_ranks: int) -> Found:
    """What the first of so many ranks finds."""
    order = {"settings": film.settings.model_dump(mode="json"), "size": [film.plan.width, film.plan.height]}
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        code = run_local([sys.executable, "-P", "-c", _AS_RANK, json.dumps(order), str(found)], num_ranks)
        if code:
            raise RuntimeFailure(f"plan --measure: a rank that measured ended with code {code}")
        values = json.loads(found.read_text())
    costs: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values["costs"].items()
    }
    return Found(**{**values, "costs": Costs(**costs)})


def measure_as_rank(order: str, out: str) -> None:
    """One of these ranks, for settings and a size in pixels; the first one writes what it finds."""
    environment = rank_of(os.environ)
    assert environment is not None, "a rank that measures has a launcher"
    end_with_supervisor(environment)
    values = json.loads(order)
    settings, (width, height) = load_settings(values=values["settings"]), values["size"]
    film = long_film(settings, facts_of(settings.model.path), sizes_of(settings.model.path))
    film = replace(film, plan=replace(film.plan, width=width, height=height))
    set_threads(settings)
    device, timeout = pick_device(settings), settings.runtime.timeout_s
    connect(device, timeout)
    ring = [(rank, (rank + 1) % environment.world_size) for rank in range(environment.world_size)]
    found = _measure(film, environment.world_size, device, DistComm(device, timeout, pairs=ring))
    if environment.rank == 0:
        Path(out).write_text(json.dumps(asdict(found)))
    disconnect()


def _measure(film: Film, num_ranks: int, device: torch.device, comm: Comm | None) -> Found:
    """On this rank; with `comm`, on all at once."""
    settings = film.settings
    if comm is None:
        threads = settings.runtime.threads or (len(os.sched_getaffinity(0)) // num_ranks if num_ranks > 1 else 0)
        torch.set_num_threads(threads or torch.get_num_threads())
    checkpoint = open_checkpoint(settings.model.path)
    decoder = checkpoint.load_decoder(getattr(torch, settings.runtime.dtype), device)
    if comm:
        meet()
    costs = measure_costs(checkpoint, decoder, settings, device, (film.plan.width, film.plan.height), PATIENCE_S)
    unit_s = _unit_seconds(film, checkpoint)
    if comm is None:
        return Found(costs, unit_s)
    meet()
    return Found(costs, unit_s, *_messages(film, num_ranks, device, comm))


def _messages(film: Film, num_ranks: int, device: torch.device, comm: Comm) -> tuple[float, float, float]:
    """Seconds of this rank's processor for a message to the next rank and one from that before, all around a ring.

    And the rates of large ones, 10^9 bytes a second: between processes, and as a decoder's state is packed or unpacked.
    What the threads of messages take is lost to the layers, for ranks leave no core free: so time of the processor
    counts, as far as it is not several threads' at once.
    """
    settings = film.settings
    own = unit_tokens(settings, film.facts, film.sizes, (film.plan.width, film.plan.height)).own
    unit = torch.zeros(settings.sampler.num_branches, own, film.facts.hidden_size, device=device)
    large = torch.zeros(LARGE_BYTES, dtype=torch.uint8, device=device)

    def exchange(payload: Tensor) -> None:
        incoming = comm.receive((comm.rank - 1) % num_ranks, payload.shape, payload.dtype)
        comm.send(Header(0, 0), payload, (comm.rank + 1) % num_ranks, window=settings.mesh.buffers)
        incoming.wait()
        comm.flush()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    caches, busy, wall, packing = _Caches(), 0.0, 0.0, 0.0
    for index in range(EXCHANGES):
        caches.displace()
        seconds = _seconds(lambda: exchange(unit), of_processor=True)
        busy += seconds if index else 0.0
    for index in range(LARGE_EXCHANGES):
        seconds = _seconds(lambda: exchange(large))
        wall += seconds if index else 0.0
        seconds = _seconds(lambda: unpack_state(pack_state({"": large})))
        packing += seconds / 2 if index else 0.0
    gigabytes = LARGE_BYTES * (LARGE_EXCHANGES - 1) / 1e9
    return busy / (EXCHANGES - 1), gigabytes / wall, gigabytes / packing


@dataclass
class _Caches:
    """The processor's. `seconds` is what it took to displace what is in them."""

    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._values = torch.zeros(CACHE_BYTES, dtype=torch.uint8)

    def displace(self) -> None:
        self.seconds += _seconds(lambda: self._values.add_(1))


def _seconds(work: Callable[[], object], *, of_processor: bool = False) -> float:
    """What work takes; or the processor's part of that."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return min(wall, processor) if of_processor else wall


# ------------------------------------------------------------------------------------------------ a unit without layers


@dataclass(frozen=True)
class _Still:
    """A stage that computes nothing: for every unit the same velocity, [branches, C, 1, 1, 1], of all its latents."""

    velocity: Tensor
    caches: _Caches

    @property
    def num_branches(self) -> int:
        return len(self.velocity)

    def forward(self, unit: Unit) -> Output:
        self.caches.displace()
        velocity = self.velocity.expand(-1, -1, unit.num_predicted, *unit.latent_size)
        return Output(velocity=velocity, kv=(None,) * len(unit.store))

    def hidden_shape(self, num_latents: int, latent_size: object) -> tuple[tuple[int, ...], torch.dtype]:
        raise AssertionError("it is the only stage")


def _unit_seconds(film: Film, checkpoint: Checkpoint) -> float:
    """Of a unit besides layers and ends: schedule, executor, guidance and solver. By two of the film's chunks."""
    settings, facts = film.settings, film.facts
    chunks = [*film.plan.chunks[:2]]
    chunks[-1] = replace(chunks[-1], num_right=0)
    plan, rules = replace(film.plan, chunks=tuple(chunks)), replace(film.rules, forecast=frozenset(), gated=frozenset())
    width, height = facts.grid.latent_size(plan.width, plan.height)
    tokens = facts.grid.tokens_per_latent(plan.width, plan.height) * max(chunk.num_latents for chunk in chunks)
    caches = _Caches()
    executor = Executor(
        _Still(torch.zeros(settings.sampler.num_branches, facts.latent_channels, 1, 1, 1), caches),
        checkpoint.make_sampler(settings.sampler, tokens),
        lambda chunk: torch.zeros(facts.latent_channels, chunk.num_latents, height, width),
        facts,
        (height, width),
    )

    def run() -> None:
        for _ in executor.run(queue_schedule(chunks, film.steps, rules), plan):
            pass

    run()
    caches.seconds = 0.0
    return max(_seconds(run) - caches.seconds, 0.0) / (len(chunks) * film.steps)
