"""A Wan layer in one native call, in three, and kernel by kernel: the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor

from longvid.kernels import matmul
from longvid.models.wan import WanStage
from longvid.models.wan_layer import WholePass
from longvid.parallel.around import KvPart
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend

pytestmark = pytest.mark.skipif(not matmul.has_matrix_units(), reason="this processor has no matrix units (AMX)")

ONE, OTHER = PromptBlend(0, 0), PromptBlend(1, 1)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_stage(checkpoint: Path, dtype: torch.dtype) -> WanStage:
    stage = WanStage(diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype))
    texts = [random(seed, count, 16) for seed, count in ((1, 5), (2, 7))]
    stage.set_prompts(texts, texts)
    return stage


def make_unit(blends: list[PromptBlend], levels: list[float], kv: tuple[object, object] | None) -> Unit:
    around = (1, 1) if kv else (0, 0)
    chunk = Chunk(0, 0, 0, 3, *around, tuple(blends), (0,) * 3, (0, 0))
    unit = Unit(chunk, 0, torch.tensor(levels), (6, 4), random(3, 4, 3, 6, 4), store=(slice(0, 1), slice(2, 3)))
    return unit if kv is None else replace(unit, left=kv[0], right=kv[1])


def run(stage: WanStage, unit: Unit) -> tuple[Tensor, list[KvPart]]:
    output = stage.forward(unit)
    return output.velocity, [part for span in output.kv for branch in span for part in branch]


def same(a: tuple[Tensor, list[KvPart]], b: tuple[Tensor, list[KvPart]]) -> bool:
    parts = zip(a[1], b[1], strict=True)
    return torch.equal(a[0], b[0]) and all(
        torch.equal(x.key, y.key) and torch.equal(x.value, y.value) for x, y in parts
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_of_a_layer_give_the_bits_of_its_kernels(
    euler_checkpoint: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(euler_checkpoint, dtype)
    made: list[WholePass] = []
    of = WholePass.of

    def noted(*args: object) -> WholePass | None:
        found = of(*args)
        made.extend([found] if found else [])
        return found

    monkeypatch.setattr(WholePass, "of", noted)
    neighbours = stage.forward(make_unit([ONE] * 3, [500.0] * 3, None)).kv
    assert len(made) == 1
    units = [
        make_unit(blends, levels, kv)
        for blends in ([ONE] * 3, [ONE, PromptBlend(0, 1, 0.5), OTHER])
        for levels in ([500.0] * 3, [300.0, 500.0, 500.0])
        for kv in (None, neighbours)
    ]
    found = [run(stage, unit) for unit in units]
    assert len(made) == 1 + 4, "with several prompts, the text is attended to between calls"
    for layer in stage.layers:
        layer.packed = None
    assert all(same(run(stage, unit), mine) for unit, mine in zip(units, found, strict=True))
    assert len({float(velocity.double().sum()) for velocity, _ in found}) == len(units)


def test_weights_that_change_are_taken_with_the_next_prompts(euler_checkpoint: Path) -> None:
    stage, unit = make_stage(euler_checkpoint, torch.float32), make_unit([ONE] * 3, [500.0] * 3, None)
    before, [packed, *_] = run(stage, unit), [layer.packed for layer in stage.layers]
    texts = [random(seed, count, 16) for seed, count in ((1, 5), (2, 7))]
    stage.set_prompts(texts, texts)
    assert stage.layers[0].packed is packed and same(run(stage, unit), before)
    with torch.no_grad():
        stage.layers[0].ffn.net[2].weight.mul_(2)
    stage.set_prompts(texts, texts)
    changed = run(stage, unit)
    assert not same(changed, before)
    stage.layers[0].packed = None
    assert same(run(stage, unit), changed)
