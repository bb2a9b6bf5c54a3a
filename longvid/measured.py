"""This machine as a `Machine`: one layer of the model and the decoder, measured at the film's own size.

Ranks on the cores of one processor slow each other. So as many processes as there will be ranks do the same work while
one of them measures.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any

import torch

from longvid.doctor import cpu_facts
from longvid.machines import MeasuredMachine, unit_tokens
from longvid.meshes import Film
from longvid.models.costs import measure_costs
from longvid.models.loader import open_checkpoint
from longvid.ranks import pick_device
from longvid.settings import Settings, load_settings

PATIENCE_S = 20.0
"""What measuring may take, of layers and of the decoder each: longer than a render takes for it, to be exact."""


def measure_machine(film: Film, num_ranks: int, *, beside: int | None = None) -> MeasuredMachine:
    """Measure with the threads that each of `num_ranks` ranks would have here, and others at work.

    `beside` is how many others are started for it; None: all but this one. Raises InputError without weights.
    """
    settings, device = film.settings, pick_device(film.settings)
    cores = len(os.sched_getaffinity(0))
    if settings.runtime.threads or num_ranks > 1:
        torch.set_num_threads(settings.runtime.threads or max(1, cores // num_ranks))
    checkpoint = open_checkpoint(settings.model.path)
    decoder = checkpoint.load_decoder(getattr(torch, settings.runtime.dtype), device)
    size = (film.plan.width, film.plan.height)
    others = beside if beside is not None else num_ranks - 1 if device.type == "cpu" else 0
    with _at_work(settings, size, others):
        costs = measure_costs(checkpoint, decoder, settings, device, size, PATIENCE_S)
    at = costs.measured_at
    return MeasuredMachine(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else str(cpu_facts()["name"]),
        memory_gb=_memory_gb(device) / (1 if device.type == "cuda" else num_ranks),
        sizes=film.sizes,
        costs=replace(costs, decode=costs.decode * settings.sampler.steps),
        unit=unit_tokens(settings, film.facts, film.sizes, size),
        cells=film.cells,
        latents=settings.queue.chunk_latents,
        notes=[f"measured at {at[0]} x {at[1]}, and scaled by operations"] if at else [],
    )


def _memory_gb(device: torch.device) -> float:
    """All of the device's, 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


@contextmanager
def _at_work(settings: Settings, size: tuple[int, int], count: int) -> Iterator[None]:
    """While so many other processes compute what a rank does."""
    context = multiprocessing.get_context("spawn")
    begun = [context.Event() for _ in range(count)]
    values = settings.model_dump(mode="json")
    processes = [
        context.Process(target=_work, args=(values, size, torch.get_num_threads(), event), daemon=True)
        for event in begun
    ]
    try:
        for process in processes:
            process.start()
        for event in begun:
            event.wait(settings.runtime.timeout_s)
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(values: dict[str, Any], size: tuple[int, int], threads: int, begun: Event) -> None:
    """In a process of its own: measure again and again, until it is ended."""
    torch.set_num_threads(threads)
    settings, device = load_settings(values=values), torch.device("cpu")
    checkpoint = open_checkpoint(settings.model.path)
    decoder = checkpoint.load_decoder(getattr(torch, settings.runtime.dtype), device)
    while True:
        begun.set()
        measure_costs(checkpoint, decoder, settings, device, size, PATIENCE_S)
