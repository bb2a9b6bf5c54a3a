"""This machine as a `Machine`: one layer of the model and the decoder, measured at the film's own size."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from longvid.doctor import cpu_facts
from longvid.engine import pick_device
from longvid.machines import MeasuredMachine, unit_tokens
from longvid.meshes import Film
from longvid.models.costs import measure_costs
from longvid.models.loader import open_checkpoint

PATIENCE_S = 20.0
"""What measuring may take, of layers and of the decoder each: longer than a render takes for it, to be exact."""


def measure_machine(film: Film, num_ranks: int) -> MeasuredMachine:
    """Measure with the threads that each of `num_ranks` ranks would have here. Raises InputError without weights."""
    settings, device = film.settings, pick_device(film.settings)
    cores = len(os.sched_getaffinity(0))
    if settings.runtime.threads or num_ranks > 1:
        torch.set_num_threads(settings.runtime.threads or max(1, cores // num_ranks))
    checkpoint = open_checkpoint(settings.model.path)
    decoder = checkpoint.load_decoder(getattr(torch, settings.runtime.dtype), device)
    size = (film.plan.width, film.plan.height)
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
