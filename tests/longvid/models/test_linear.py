"""A stage's linear layers by matrix units: what torch's give, from weights that may be packed, changed or far away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longvid.models.linear as linear_module
from longvid.kernels import matmul
from longvid.models.checkpoint import StageOptions
from longvid.models.costs import typical_unit
from longvid.models.linear import MatrixLinear, take_linears
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.settings import Settings

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not matmul.has_matrix_units(), reason="this processor has no matrix units (AMX)")


def run_stage(root: Path, dtype: torch.dtype, linear: str) -> tuple[Any, Tensor]:
    """A stage of all layers, and the velocity of a unit of noise."""
    checkpoint = open_checkpoint(str(root))
    facts = checkpoint.facts
    size = facts.width, facts.height
    options = StageOptions(linear=linear)
    stage: Any = checkpoint.load_stage(ModelPart(range(facts.num_layers)), dtype, CPU, options)
    stage.prepare(checkpoint.blank_inputs(CPU, size))
    unit = typical_unit(facts, Settings(), CPU, size)
    assert unit.latents is not None
    noise = torch.randn(unit.latents.shape, generator=torch.Generator().manual_seed(0))
    return stage, stage.forward(replace(unit, latents=noise)).velocity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ti2v", "i2v 2.1", "ltx", "hunyuan", "cogvideox 5b"])
def test_every_family_computes_what_it_does_with_torch(
    kind: str, dtype: torch.dtype, checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, found = run_stage(checkpoint_of(kind), dtype, "auto")
    linears = [
        (name, module)
        for layer in stage.layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert all(isinstance(module, MatrixLinear) == ("norm" not in name) for name, module in linears)
    plain, expected = run_stage(checkpoint_of(kind), dtype, "torch")
    assert not any(isinstance(module, MatrixLinear) for layer in plain.layers for module in layer.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (found - expected).norm() <= tolerance * expected.norm()
    monkeypatch.setattr(linear_module, "MOST_PACKED_BYTES", 0)
    lean, same = run_stage(checkpoint_of(kind), dtype, "auto")
    assert torch.equal(same, found)
    kept = [[m._packed for x in s.layers for m in x.modules() if isinstance(m, MatrixLinear)] for s in (stage, lean)]
    assert any(kept[0]) and not any(kept[1])


def test_a_weight_that_changes_is_packed_anew() -> None:
    layer = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 8))
    take_linears([layer])
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer[0].weight.mul_(3),
            lambda: setattr(layer[0], "weight", nn.Parameter(-layer[0].weight)),
        ):
            change()
            first = matmul.linear(x, layer[0].weight, layer[0].bias)
            assert torch.equal(layer(x), matmul.linear(first, layer[1].weight, layer[1].bias))
    layer(x).sum().backward()
    assert layer[0].weight.grad is not None
