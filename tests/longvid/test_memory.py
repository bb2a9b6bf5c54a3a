"""What the plan says a rank will hold is what it holds."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest

from longvid.bench.memory import MemoryWatch
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.facts import weight_bytes
from longvid.models.parts import ModelPart, read_shapes
from longvid.overview import Overview
from longvid.script import parse_script

STORY = """
negative: "blue"
scenes:
  - {prompt: "a red circle moving left", for: 61f}
"""


@pytest.mark.parametrize(
    "overrides",
    [
        ["queue.left=recompute"],
        ["queue.left=cached", "sampler.guidance=3"],
        ["queue.left=cached", "queue.gap=2"],
        ["cache.policy=first_block", "cache.first_steps=2"],
    ],
    ids=" ".join,
)
def test_a_render_holds_what_was_planned(tiny_model: Path, overrides: list[str]) -> None:
    common = ["sampler.steps=5", "queue.chunk_latents=4", "queue.context_latents=2"]
    engine = Engine.load(tiny_model, overrides=[*common, *overrides])
    script = parse_script(STORY, "story.yaml")
    found = MemoryWatch(engine).run(script)
    weights = partial(weight_bytes, str(tiny_model))
    overview = Overview.of(engine.plan(script), engine.settings, engine.facts, weights=weights)
    [planned] = overview.memory
    assert found["weights_mb"] == pytest.approx(planned.weights_mb, rel=0.02)
    assert 0.6 * planned.latents_mb <= found["latents_mb"] <= planned.latents_mb  # all chunks taken for the largest
    if engine.cache is None:
        assert found["kv_mb"] == pytest.approx(planned.kv_mb)
    else:
        assert found["kv_mb"] <= planned.kv_mb
        assert found["cache_mb"] == pytest.approx(planned.cache_mb, rel=0.2)


def test_parts_of_the_weights_are_all_of_them(tiny_model: Path) -> None:
    """But for the embedders, which every stage needs."""
    name = str(tiny_model)
    whole = weight_bytes(name, ModelPart(range(2)), 4)
    first, last = (weight_bytes(name, ModelPart(range(i, i + 1), i == 0, i == 1), 4) for i in range(2))
    shapes = read_shapes(next((tiny_model / "transformer").glob("*.safetensors")))
    shared = sum(4 * math.prod(shape) for tensor, shape in shapes.items() if tensor.startswith("condition_embedder."))
    assert first + last - shared == whole
    assert weight_bytes(name, ModelPart(range(2)), 2) * 2 == whole


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, (10).to_bytes(8, "little") + b"not json.."])
def test_a_damaged_header_is_told(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"model\.safetensors: is corrupt or truncated"):
        read_shapes(path)
