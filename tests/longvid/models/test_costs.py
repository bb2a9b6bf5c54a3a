"""What is measured at a small size is scaled by operations, and these are what torch counts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longvid.kernels import dense
from longvid.models.checkpoint import Checkpoint, StageOptions
from longvid.models.costs import Size, among_neighbours, measure_costs, scaled_costs, smaller_sizes, typical_unit
from longvid.models.families import known_sizes
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.parallel.partition import Costs
from longvid.settings import load_settings

CPU = torch.device("cpu")
CheckpointOf = Callable[[str], Path]


@pytest.fixture(scope="module", params=["mini", "cogvideox 5b", "ltx", "hunyuan"])
def checkpoint(request: pytest.FixtureRequest, checkpoint_of: CheckpointOf) -> Checkpoint:
    return open_checkpoint("mini" if request.param == "mini" else str(checkpoint_of(request.param)))


def counted(work: Callable[[], object]) -> int:
    """With attention written out, and convolutions of torch's own: those of a CPU are not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def size_of(checkpoint: Checkpoint) -> Size:
    """Of four tokens by four."""
    grid = checkpoint.facts.grid
    return 4 * grid.spatial * grid.patch[2], 4 * grid.spatial * grid.patch[1]


def test_costs_grow_with_the_size_as_the_counted_operations_do(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "MIN_KEYS", {})  # torch counts what it computes itself
    facts, settings = checkpoint.facts, load_settings(None, ["queue.chunk_latents=2", "queue.context_latents=1"])
    large = size_of(checkpoint)
    small = list(smaller_sizes(facts, large))[2]
    assert 4 * facts.grid.tokens_per_latent(*small) == facts.grid.tokens_per_latent(*large) == 16
    stages = [
        checkpoint.load_stage(ModelPart(range(count), is_last=False), torch.float32, CPU, StageOptions(linear="torch"))
        for count in (0, 1)
    ]
    decoder = checkpoint.load_decoder(torch.float32, CPU)
    around = partial(among_neighbours, settings=settings)

    def operations(size: Size) -> tuple[int, int]:
        """Of a unit in a layer, and of decoding two latents, which are not the first."""
        unit, inputs = typical_unit(facts, settings, CPU, size), checkpoint.blank_inputs(CPU, size)
        for stage in stages:
            stage.prepare(inputs)
            stage.forward(unit)  # what is computed once a prompt
        no_layer, a_layer = stages
        ends, one = counted(partial(no_layer.forward, unit)), counted(partial(a_layer.forward, around(a_layer, unit)))
        decoder.reset()
        decoder.push(unit.latents[:, -1:])
        return one - ends, counted(lambda: decoder.push(unit.latents[:, -2:]))

    before, after = operations(small), operations(large)
    ones = Costs((1.0,) * facts.num_layers, 1.0, 1.0, 1.0)
    scaled = scaled_costs(ones, known_sizes(checkpoint.configs), settings, facts, small, large)
    assert scaled.layers[0] == pytest.approx(after[0] / before[0], rel=0.05)
    if facts.family == "cogvideox":  # others wait for what follows, or are not counted on a CPU
        assert scaled.decode == pytest.approx(after[1] / before[1], rel=0.05)


def test_what_takes_too_long_is_measured_smaller_and_said(checkpoint: Checkpoint) -> None:
    settings = load_settings(None, ["queue.chunk_latents=2", "queue.context_latents=1"])
    decoder = checkpoint.load_decoder(torch.float32, CPU)
    size = size_of(checkpoint)
    whole, hurried = (measure_costs(checkpoint, decoder, settings, CPU, size, limit) for limit in (1e9, 0.0))
    assert whole.measured_at is None and hurried.measured_at
    assert hurried.measured_at < size
    assert len(hurried.layers) == len(whole.layers) and min(*hurried.layers, hurried.decode) > 0
