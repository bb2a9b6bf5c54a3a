"""The engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel

from longvid.engine import Engine
from longvid.models.parts import ModelPart
from longvid.models.wan import WanStage
from longvid.models.wan_facts import WAN_PARTS
from longvid.models.weights import load_part
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend
from longvid.script import parse_script
from longvid.settings import load_settings
from longvid.sparsity.make import make_policy
from longvid.sparsity.runtime import Place, PolicyAttention, SparseRuntime
from longvid.sparsity.tokens import TokenMap

STORY = """
size: [32, 48]
seed: 3
negative: "blue cat"
scenes:
  - {prompt: "a red circle moving left", for: 21f}
"""


def stock_latents(checkpoint: Path, engine: Engine, steps: int, guidance: float) -> torch.Tensor:
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    noise = engine._noise(plan)(plan.chunks[0])
    pipeline = diffusers.WanPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=plan.prompts[0],
        negative_prompt=plan.negatives[0],
        width=plan.width,
        height=plan.height,
        num_frames=plan.num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise[None],
        output_type="latent",
    )
    latents: torch.Tensor = result.frames[0]
    return latents


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["euler_checkpoint", "unipc_checkpoint"])
def test_sequential_render_equals_the_stock_pipeline(
    kind: str, guidance: float, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(kind)
    overrides = ["schedule=sequential", "sampler.steps=4", f"sampler.guidance={guidance}"]
    engine = Engine.load(checkpoint, overrides=overrides)
    (finished,) = engine.denoise(engine.plan(parse_script(STORY, "story.yaml")))
    expected = stock_latents(checkpoint, engine, steps=4, guidance=guidance)
    assert finished.latents.shape == expected.shape
    assert (finished.latents - expected).abs().max() <= 1e-4


def unit_of(num_latents: int, timesteps: list[float], blends: list[PromptBlend], latents: torch.Tensor) -> Unit:
    chunk = Chunk(0, 0, 0, num_latents, 0, 0, tuple(blends), (0,) * num_latents, (0, 0))
    return Unit(chunk, 0, torch.tensor(timesteps), (6, 4), latents)


@pytest.fixture
def stage(euler_checkpoint: Path) -> WanStage:
    dit = diffusers.WanTransformer3DModel.from_pretrained(euler_checkpoint / "transformer")
    return WanStage(dit)


def stock_velocity(checkpoint: Path, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    dit = diffusers.WanTransformer3DModel.from_pretrained(checkpoint / "transformer").eval()
    padded = torch.cat([text, text.new_zeros(512 - text.shape[0], text.shape[1])])[None]
    with torch.no_grad():
        velocity: torch.Tensor = dit(latents[None], timestep, padded, return_dict=False)[0][0]
    return velocity


def test_each_latent_is_given_its_own_timestep(euler_checkpoint: Path, stage: WanStage) -> None:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(4, 3, 6, 4, generator=generator)
    text = torch.randn(5, 16, generator=generator)
    stage.set_prompts([text], [text])
    levels = [100.0, 500.0, 900.0]
    [got] = stage.forward(unit_of(3, levels, [PromptBlend(0, 0)] * 3, latents)).velocity
    per_token = torch.tensor(levels).repeat_interleave(6)[None]
    assert (got - stock_velocity(euler_checkpoint, latents, per_token, text)).abs().max() <= 1e-5


def test_each_latent_attends_its_own_scenes_prompt(stage: WanStage) -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(4, 4, 6, 4, generator=generator)
    texts = [torch.randn(n, 16, generator=generator) for n in (5, 7)]
    stage.set_prompts(texts, texts)
    times = [500.0] * 4
    a, b = PromptBlend(0, 0), PromptBlend(1, 1)
    one = stage.forward(unit_of(4, times, [a] * 4, latents)).velocity
    mixed = stage.forward(unit_of(4, times, [a, a, b, b], latents)).velocity
    full_blend = stage.forward(unit_of(4, times, [a, a, PromptBlend(0, 1, 1.0), b], latents)).velocity
    half_blend = stage.forward(unit_of(4, times, [a, a, PromptBlend(0, 1, 0.5), b], latents)).velocity
    assert (mixed - one).abs().max() > 1e-4
    assert (full_blend - mixed).abs().max() <= 1e-5
    assert (half_blend - mixed).abs().max() > 1e-5
    assert (half_blend - one).abs().max() > 1e-5


def test_neighbours_kv_act_as_tokens_beside_the_input(stage: WanStage) -> None:
    """A one-layer view: K/V stored from tokens equal the same tokens joined to the input, on either side."""
    stage.dit.blocks = stage.dit.blocks[:1]
    generator = torch.Generator().manual_seed(4)
    left, own, right = (torch.randn(4, n, 6, 4, generator=generator) for n in (1, 3, 2))
    text = torch.randn(5, 16, generator=generator)
    stage.set_prompts([text], [text])
    a = PromptBlend(0, 0)
    joined = stage.forward(unit_of(6, [500.0] * 6, [a] * 6, torch.cat([left, own, right], dim=1))).velocity[0, :, 1:4]

    def stored(latents: torch.Tensor) -> object:
        count = latents.shape[1]
        unit = unit_of(count, [500.0] * count, [a] * count, latents)
        return stage.forward(replace(unit, store=(slice(0, count),))).kv[0]

    chunk = Chunk(0, 0, 0, 3, 1, 2, (a,) * 4, (0,) * 3, (0, 0))
    alone = Unit(chunk, 0, torch.tensor([500.0] * 3), (6, 4), own)
    got = stage.forward(replace(alone, left=stored(left), right=stored(right))).velocity[0]
    assert (got - joined).abs().max() <= 1e-5
    for missing in (replace(alone, right=stored(right)), replace(alone, left=stored(left))):
        assert (stage.forward(missing).velocity[0] - joined).abs().max() > 1e-4


class DevicesSeen(SparseRuntime):
    """Remembers where attention was said to be computed."""

    def at(self, place: Place, tokens: TokenMap, device: torch.device) -> PolicyAttention | None:
        self.seen = device
        return super().at(place, tokens, device)


@pytest.mark.parametrize("part", [ModelPart(range(1), is_last=False), ModelPart(range(1, 2), is_first=False)])
def test_every_part_of_the_layers_has_its_attention_planned_for_the_device(
    euler_checkpoint: Path, part: ModelPart
) -> None:
    policy = make_policy(load_settings(None, ["attention.policy=sta"]).attention)
    runtime, device = DevicesSeen(policy, 2, 2), torch.device("cpu")
    dit = load_part(WanTransformer3DModel, euler_checkpoint / "transformer", part, WAN_PARTS, torch.float32, device)
    stage = WanStage(dit, is_first=part.is_first, is_last=part.is_last, attention=runtime)
    stage.set_prompts([torch.zeros(3, 16)], [])
    unit = unit_of(2, [500.0] * 2, [PromptBlend(0, 0)] * 2, torch.zeros(4, 2, 6, 4))
    if not part.is_first:
        unit = replace(
            unit,
            latents=None,
            hidden=torch.zeros(1, 2 * 6, dit.config.num_attention_heads * dit.config.attention_head_dim),
        )
    stage.forward(unit)
    assert runtime.seen == device
