"""What the parts of a render cost on this machine: measured, so that layers can be dealt out evenly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from longvid.models.checkpoint import Checkpoint, StageOptions, StreamDecoder
from longvid.models.parts import ModelPart
from longvid.parallel.partition import Costs
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend
from longvid.settings import Settings

REPEATS = 5


@torch.no_grad()
def measure_costs(
    checkpoint: Checkpoint,
    decoder: StreamDecoder,
    settings: Settings,
    device: torch.device,
    size: tuple[int, int] | None = None,
) -> Costs:
    """Seconds for a unit of one branch: each layer, the two ends, and a step's share of decoding.

    `size` is the film's width and height in pixels, else the model's own. Reads one layer of each kind: they are all
    alike.
    """
    unit = _unit(checkpoint, settings, device, size)
    dtype, inputs = getattr(torch, settings.runtime.dtype), checkpoint.blank_inputs(device)

    def seconds(layers: range) -> float:
        stage = checkpoint.load_stage(ModelPart(layers), dtype, device, StageOptions())
        stage.prepare(inputs)
        return _seconds(lambda: stage.forward(unit), device)

    dual, count = checkpoint.facts.dual_layers, checkpoint.facts.num_layers
    ends = seconds(range(0))
    kinds = [kind for kind in (range(dual), range(dual, count)) if kind]
    one_of = {kind: max(seconds(kind[:1]) - ends, 1e-6) for kind in kinds}
    layers = [one_of[kind] for kind in kinds for _ in kind]
    assert unit.latents is not None
    own = unit.latents[:, -settings.queue.chunk_latents :]
    decoding = _seconds(lambda: decoder.push(own), device) / settings.sampler.steps
    decoder.reset()
    return Costs(tuple(layers), ends / 2, ends / 2, decoding)


def _unit(checkpoint: Checkpoint, settings: Settings, device: torch.device, size: tuple[int, int] | None) -> Unit:
    """A unit as most of a film's are: with left context, at two noise levels."""
    facts, queue = checkpoint.facts, settings.queue
    width, height = facts.grid.latent_size(*(size or (facts.width, facts.height)))
    left = queue.context_latents if settings.recomputes_left else 0
    count = left + queue.chunk_latents
    latents = torch.zeros(facts.latent_channels, count, height, width, device=device)
    chunk = Chunk(0, 0, left, queue.chunk_latents, left, 0, (PromptBlend(0, 0),) * count, (), (0, 0))
    timesteps = torch.tensor([400.0] * left + [500.0] * queue.chunk_latents)
    return Unit(chunk, 0, timesteps, (height, width), latents)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of a few runs, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
