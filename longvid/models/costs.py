"""What the parts of a render cost on this machine: measured, so that layers can be dealt out evenly."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from longvid.geometry import EACH_ALONE
from longvid.machines import unit_tokens
from longvid.models.checkpoint import Checkpoint, FamilyStage, StageOptions, StreamDecoder
from longvid.models.families import known_sizes
from longvid.models.parts import ModelPart
from longvid.models.sizes import Sizes, layer_bytes
from longvid.parallel.partition import Costs
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, ModelFacts, PromptBlend
from longvid.settings import Settings

REPEATS, FEWEST = 6, 2
"""Runs that are timed: fewer of a large unit, for a smaller size attains less than it."""
SOME, SOME_BYTES = 4, 32 << 20
"""Layers of a kind that are measured together, and what their weights may take: a processor's cache or more."""
PATIENCE_S = 3.0
"""What measuring may take: larger units are measured at a smaller size of the picture."""

Size = tuple[int, int]
"""Width and height in pixels."""


@torch.no_grad()
def measure_costs(
    checkpoint: Checkpoint,
    decoder: StreamDecoder,
    settings: Settings,
    device: torch.device,
    size: Size | None = None,
    patience_s: float = PATIENCE_S,
) -> Costs:
    """Seconds for a unit of one branch: each layer, the two ends, and a step's share of decoding.

    `size` is the film's width and height in pixels, else the model's own. Where that would take longer than
    `patience_s` in all, a smaller picture is measured, and what was found is scaled by operations;
    `Costs.measured_at` says so. Reads some layers of each kind: they are all alike.
    """
    facts, sizes = checkpoint.facts, known_sizes(checkpoint.configs)
    wanted = size or (facts.width, facts.height)
    bench = _Bench(checkpoint, decoder, settings, device)

    def scaled(costs: Costs, at: Size, to: Size) -> Costs:
        return costs if sizes is None or at == to else scaled_costs(costs, sizes, settings, facts, at, to)

    def measured(run: Callable[[Size, int], Costs]) -> tuple[Costs, Size]:
        """At the largest size that patience allows, found from below: small units attain less of a machine's rate."""
        ladder = list(smaller_sizes(facts, wanted)) if sizes else [wanted]
        at = ladder[-1]
        once = run(at, 1)
        while at != wanted:
            short = (some for some in ladder if bench.seconds_of(scaled(once, at, some)) * (FEWEST + 1) <= patience_s)
            largest = next(short, at)
            if ladder.index(largest) >= ladder.index(at):
                break
            at = largest
            once = run(at, 1)
        within = int(patience_s / bench.seconds_of(once)) - 1
        return run(at, max(FEWEST, min(REPEATS, within))), at

    (layers, at), (decoding, decoded_at) = measured(bench.layers), measured(bench.decoding)
    costs = replace(scaled(layers, at, wanted), decode=scaled(decoding, decoded_at, wanted).decode)
    smallest = min(at, decoded_at)
    return costs if smallest == wanted else replace(costs, measured_at=smallest)


def smaller_sizes(facts: ModelFacts, size: Size) -> Iterator[Size]:
    """The size, and again and again with half of its longer side, as far as there are some tokens in it."""
    _, down, across = facts.grid.patch
    units = facts.grid.spatial * across, facts.grid.spatial * down
    counts = [size[0] // units[0], size[1] // units[1]]
    yield size
    while max(counts) >= 4:
        longer = counts.index(max(counts))
        counts[longer] //= 2
        yield counts[0] * units[0], counts[1] * units[1]


def scaled_costs(costs: Costs, sizes: Sizes, settings: Settings, facts: ModelFacts, at: Size, size: Size) -> Costs:
    """Costs that were measured at one size, at another: each part by its operations."""
    before, after = (unit_tokens(settings, facts, sizes, some) for some in (at, size))
    count = sizes.operations
    layers = tuple(
        seconds * count(layer.flops(after)) / count(layer.flops(before))
        for seconds, layer in zip(costs.layers, sizes.layers, strict=True)
    )
    latents = [facts.grid.latent_size(*some) for some in (at, size)]
    decoded = [sizes.vae.flops(width * height, settings.queue.chunk_latents) for width, height in latents]
    ends = count(sizes.ends_flops(after)) / count(sizes.ends_flops(before))
    return Costs(layers, costs.first * ends, costs.last * ends, costs.decode * decoded[1] / decoded[0])


def typical_unit(facts: ModelFacts, settings: Settings, device: torch.device, size: Size) -> Unit:
    """A unit as most of a film's are, but for neighbours' K/V: with left context, at two noise levels."""
    queue = settings.queue
    width, height = facts.grid.latent_size(*size)
    left = queue.context_latents if settings.recomputes_left else 0
    count = left + queue.chunk_latents
    latents = torch.zeros(facts.latent_channels, count, height, width, device=device)
    chunk = Chunk(0, 0, left, queue.chunk_latents, left, 0, (PromptBlend(0, 0),) * count, (), (0, 0))
    timesteps = torch.tensor([400.0] * left + [500.0] * queue.chunk_latents)
    return Unit(chunk, 0, timesteps, (height, width), latents)


def among_neighbours(stage: FamilyStage, unit: Unit, settings: Settings) -> Unit:
    """The unit with K/V of its neighbours, as those of a film have them, that keeps its own for them."""
    queue = settings.queue
    if settings.schedule != "queue" or not queue.context_latents:
        return unit
    context, count, is_cached = queue.context_latents, len(unit.timesteps), not settings.recomputes_left
    first = count - unit.chunk.num_latents
    spans = (slice(first, first + context), *([slice(count - context, count)] if is_cached else []))
    kv = stage.forward(replace(unit, store=spans)).kv
    around = replace(unit.chunk, num_right=context, num_left=context if is_cached else unit.chunk.num_left)
    return replace(unit, chunk=around, store=spans, right=kv[0], left=kv[-1] if is_cached else None)


class _Bench:
    """Some layers of each kind, the ends and the decoder, to be timed at several sizes.

    One small layer again and again would find its weights in the processor's cache, where other layers displace them in
    a film. So there are several, as long as they are small.
    """

    def __init__(
        self, checkpoint: Checkpoint, decoder: StreamDecoder, settings: Settings, device: torch.device
    ) -> None:
        self._checkpoint, self._decoder = checkpoint, decoder
        self._settings, self._device = settings, device
        dual, count = checkpoint.facts.dual_layers, checkpoint.facts.num_layers
        self._kinds = [kind for kind in (range(dual), range(dual, count)) if kind]
        sizes, itemsize = known_sizes(checkpoint.configs), getattr(torch, settings.runtime.dtype).itemsize
        each = [layer_bytes(sizes.layers[kind.start], itemsize) if sizes else SOME_BYTES for kind in self._kinds]
        counts = [max(1, min(SOME, SOME_BYTES // size)) for size in each]
        self._some = [kind[:most] for kind, most in zip(self._kinds, counts, strict=True)]
        self._stages: dict[range, FamilyStage] = {}

    def layers(self, size: Size, repeats: int) -> Costs:
        """All but decoding: medians of some runs."""
        unit = typical_unit(self._checkpoint.facts, self._settings, self._device, size)
        inputs = self._checkpoint.blank_inputs(self._device, size)

        def seconds(layers: range) -> float:
            stage = self._stage(layers)
            stage.prepare(inputs)
            whole = among_neighbours(stage, unit, self._settings) if layers else unit
            return statistics.median(self._times(lambda: stage.forward(whole), repeats))

        ends = seconds(range(0))
        each = [max(seconds(some) - ends, 1e-6) / len(some) for some in self._some]
        layers = tuple(cost for cost, kind in zip(each, self._kinds, strict=True) for _ in kind)
        return Costs(layers, ends / 2, ends / 2)

    def decoding(self, size: Size, repeats: int) -> Costs:
        """A step's share of decoding alone."""
        facts, settings = self._checkpoint.facts, self._settings
        unit, passes = typical_unit(facts, settings, self._device, size), facts.decoder_passes
        assert unit.latents is not None
        count = self._pushed
        own = unit.latents[:, -1:].expand(-1, count, -1, -1)
        self._decoder.push(unit.latents[:, -1:].expand(-1, passes.first, -1, -1))
        times = self._times(lambda: self._decoder.push(own), repeats)
        starts = range(passes.first + count, passes.first + (repeats + 1) * count, count)
        works = [sum(passes.works(range(start, start + count), starts.stop + 1)) for start in starts]
        seconds = statistics.median(time / work for time, work in zip(times, works, strict=True))
        self._decoder.reset()
        of_chunk = settings.queue.chunk_latents * passes.repeated
        nothing = (0.0,) * facts.num_layers
        return Costs(nothing, decode=seconds * of_chunk / settings.sampler.steps)

    @property
    def _pushed(self) -> int:
        """Latents that the decoder is given at a time: a chunk, or a pass's where each is a call of its own. A smaller
        picture would tell less of the film's than fewer latents do.
        """
        passes = self._checkpoint.facts.decoder_passes
        return self._settings.queue.chunk_latents if passes == EACH_ALONE else passes.step

    def seconds_of(self, costs: Costs) -> float:
        """What a run takes that finds such costs."""
        some_of_each = sum(costs.layers[layer] for some in self._some for layer in some)
        ends = (1 + len(self._kinds)) * (costs.first + costs.last)
        part = self._pushed / self._settings.queue.chunk_latents
        return some_of_each + ends + part * costs.decode * self._settings.sampler.steps

    def _stage(self, layers: range) -> FamilyStage:
        dtype = getattr(torch, self._settings.runtime.dtype)
        if layers not in self._stages or self._checkpoint.pipeline:  # stages of a pipeline share its transformer
            options = StageOptions(linear=self._settings.runtime.linear)
            self._stages[layers] = self._checkpoint.load_stage(ModelPart(layers), dtype, self._device, options)
        return self._stages[layers]

    def _times(self, work: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of a few runs, after one that warms up."""
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return times[1:]
