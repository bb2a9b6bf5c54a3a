"""The engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

from longvid.engine import Engine
from longvid.models.wan import WanStage
from longvid.models.wan_vae import WanStreamDecoder, to_uint8, use_onednn
from longvid.parallel.executor import Unit
from longvid.plan import Chunk, PromptBlend
from longvid.script import parse_script

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


def test_streamed_decode_is_bit_equal_to_the_whole_decode(euler_checkpoint: Path) -> None:
    vae = diffusers.AutoencoderKLWan.from_pretrained(euler_checkpoint / "vae").eval()
    decoder = WanStreamDecoder(vae)
    latents = torch.randn(4, 6, 6, 4, generator=torch.Generator().manual_seed(1))
    streamed = torch.cat([decoder.push(latents[:, i:j]) for i, j in ((0, 2), (2, 3), (3, 6))])
    shape = (1, 4, 1, 1, 1)
    scaled = latents[None] * torch.tensor(vae.config.latents_std).view(shape)
    scaled = scaled + torch.tensor(vae.config.latents_mean).view(shape)
    with torch.no_grad():
        whole = to_uint8(vae.decode(scaled).sample[0])
    assert streamed.shape == (21, 48, 32, 3)
    assert torch.equal(streamed, whole)


def test_onednn_convolutions_decode_as_the_stock_ones_do(euler_checkpoint: Path) -> None:
    stock, ours = (diffusers.AutoencoderKLWan.from_pretrained(euler_checkpoint / "vae").eval() for _ in range(2))
    use_onednn(ours.decoder)
    latents = torch.randn(1, 4, 3, 6, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = stock.decode(latents).sample - ours.decode(latents).sample
    assert difference.abs().max() <= 1e-5


def unit_of(num_latents: int, timesteps: list[float], blends: list[PromptBlend], latents: torch.Tensor) -> Unit:
    chunk = Chunk(0, 0, 0, num_latents, 0, 0, tuple(blends), (0,) * num_latents, (0, 0))
    return Unit(chunk, 0, latents, torch.tensor(timesteps), None, None)


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
    got = stage.forward(unit_of(3, levels, [PromptBlend(0, 0)] * 3, latents)).velocity
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


def test_right_context_acts_as_tokens_at_the_following_positions(stage: WanStage) -> None:
    """A one-layer view: K/V stored from tokens equal the same tokens joined to the input, in layer 0."""
    stage.dit.blocks = stage.dit.blocks[:1]
    generator = torch.Generator().manual_seed(4)
    own, right = (torch.randn(4, n, 6, 4, generator=generator) for n in (3, 2))
    text = torch.randn(5, 16, generator=generator)
    stage.set_prompts([text], [text])
    a = PromptBlend(0, 0)
    joined = stage.forward(unit_of(5, [500.0] * 5, [a] * 5, torch.cat([own, right], dim=1))).velocity[:, :3]
    neighbour = unit_of(2, [500.0] * 2, [a] * 2, right)
    stored = stage.forward(Unit(neighbour.chunk, 0, right, neighbour.timesteps, None, slice(0, 2))).kv
    chunk = Chunk(0, 0, 0, 3, 0, 2, (a,) * 3, (0,) * 3, (0, 0))
    got = stage.forward(Unit(chunk, 0, own, torch.tensor([500.0] * 3), stored, None)).velocity
    assert (got - joined).abs().max() <= 1e-5
    without = stage.forward(Unit(chunk, 0, own, torch.tensor([500.0] * 3), None, None)).velocity
    assert (without - joined).abs().max() > 1e-4
